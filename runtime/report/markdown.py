"""The full report as Markdown, and what every Markdown report is written with: tables, and texts of others escaped."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...specializers.shelf.variant import Variant
from ..store.store import RunStore
from .document import BatchSection, Document, read_document
from .reading import explained
from .table import Table

__all__ = ["batch_line", "escaped", "render_markdown", "table_lines", "workflow_lines"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SYNTAX = re.compile(r"[\\`|<&*]|(?<=\])[(\[]")


def render_markdown(
    store: RunStore, batches: Sequence[str], probe: Path | None = None, curves: Sequence[Variant] = ()
) -> str:
    """The page's tables as Markdown, the workflow as Mermaid text; figures are the page's alone.

    Raises: as `read_document`.
    """
    document = read_document(store, batches, probe, curves)
    lines = [f"# {escaped(document.title)}", "", *table_lines(document.summary)]
    for found, table in document.comparisons:
        lines += ["", f"## {escaped(found.other)} against {escaped(found.baseline)}", ""]
        lines += [f"{found.pairs} tasks were run by both; differences are of the same task with itself.", ""]
        lines += table_lines(table)
    for part in document.parts:
        lines += ["", f"## {escaped(part.name)}", "", batch_line(part)]
        for note in (*part.notes, part.energy):
            lines += ["", escaped(note)]
        for title, note, table in part.tables:
            lines += ["", f"### {title}", "", *([note, ""] if note else []), *table_lines(table)]
    lines += workflow_lines(document)
    if document.probed is not None:
        lines += ["", "## Profiles", "", *table_lines(document.probed.profiles)]
    for one in document.thought:
        lines += ["", f"## Thinking of {escaped(one.role)}: {escaped(one.variant)}", "", *table_lines(one.table)]
    lines += ["", "## How to read it", "", *(f"- {escaped(line)}" for line in explained(document.all_tables()))]
    return "\n".join([*lines, ""])


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line: nothing in it is markup, HTML or an order to a terminal."""
    return _SYNTAX.sub(lambda found: "\\" + found[0], _CONTROL.sub(" ", text))


def table_lines(table: Table) -> list[str]:
    """A table as lines of Markdown."""
    alone = table.ungrouped()
    align = ["---" if at < alone.names else "---:" for at in range(len(alone.heads))]
    return [_row(map(escaped, alone.heads)), _row(align), *(_row(map(escaped, row)) for row in alone.rows)]


def batch_line(part: BatchSection) -> str:
    """Which batch this is, of which workflow, when it began and how it ended."""
    batch = part.ledger.batch
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(batch.created_at))
    return f"Batch `{batch.id}` of workflow `{batch.graph}`, {date}, {part.state}."


def workflow_lines(document: Document) -> list[str]:
    """Each workflow once, as Mermaid text."""
    lines = []
    for picture in dict.fromkeys(part.ledger.batch.picture.rstrip() for part in document.parts):
        lines += ["", "## Workflow", "", "```mermaid", picture, "```"]
    return lines


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
