"""The brief report for a terminal: what the page says of costs and results, in tables of few columns, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..store.store import RunStore
from .document import BatchSection, read_document
from .markdown import batch_line, escaped, table_lines, workflow_lines
from .reading import explained
from .table import THIN_SPACE, Table
from .text import ReportText

__all__ = ["render_report"]

MOST_FIGURES = 8
IN_TABLES, IN_LINES = ("Roles", "Tools"), ("Engines", "Runs that failed")
"""Tables of a batch that are shown: narrow ones, and those whose rows are too long for a terminal's table."""


def render_report(store: RunStore, batches: Sequence[str]) -> ReportText:
    """Markdown of one or more batches, finished or broken; several are shown side by side.

    Per batch: runs, tasks solved, second rounds, wall and CPU-seconds, cost-of-pass; per role: variant, tokens,
    seconds in queue, prefill and decode, CPU-seconds, adapter swaps, asks that had to be corrected.
    Raises: ResumeError for a batch that is not there.
    """
    if not batches:
        return ReportText("# metier report\n\nNo runs yet.\n")
    document = read_document(store, batches)
    summary = _plain(document.summary.brief())
    shown, lines = [summary], ["# metier report", "", *table_lines(summary)]
    for part in document.parts:
        lines += ["", f"## {escaped(part.name)}", "", batch_line(part)]
        for note in part.notes:
            lines += ["", escaped(note)]
        for title, table in _chosen(part):
            if title in IN_LINES:
                lines += ["", f"{title}:", "", *_as_lines(table)]
                continue
            shown.append(table)
            for narrow in table.narrow(MOST_FIGURES):
                lines += ["", *table_lines(narrow)]
    lines += [*workflow_lines(document), "", "## How to read it", ""]
    lines += (f"- {escaped(line)}" for line in explained(shown))
    return ReportText("\n".join([*lines, ""]), document)


def _chosen(part: BatchSection) -> Iterator[tuple[str, Table]]:
    for title, _, table in part.tables:
        if title in IN_TABLES or title in IN_LINES:
            yield title, _plain(table)


def _plain(table: Table) -> Table:
    """Numbers without spaces in them, which a terminal would break lines at."""
    rows = [(*row[: table.names], *(cell.replace(THIN_SPACE, "") for cell in row[table.names :])) for row in table.rows]
    return Table(table.heads, tuple(rows), table.names, table.groups)


def _as_lines(table: Table) -> list[str]:
    """A line for each row: its name, then what it has under each other head, unless that is nothing."""
    lines = []
    for name, *cells in table.rows:
        under = zip(table.heads[1:], cells, strict=True)
        figures = [f"{head} {escaped(cell)}" for head, cell in under if cell not in ("", "0")]
        lines.append(f"- {escaped(name)}: {', '.join(figures)}")
    return lines
