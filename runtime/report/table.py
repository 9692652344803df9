"""A table of a report, and how its cells are written; every renderer draws the same one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["NOTHING", "THIN_SPACE", "Group", "Table", "count", "number", "percent"]

NOTHING = "–"
THIN_SPACE = "\u202f"


@dataclass(frozen=True)
class Group:
    """One head over several columns. `unit` follows each of their heads where there is no line for such heads."""

    title: str
    columns: int
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under heads; the first `names` columns are names, the others numbers.

    `groups` are heads over several columns, the first of them over the names. `details` are the heads that only a full
    report shows.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    groups: tuple[Group, ...] = ()
    details: tuple[str, ...] = ()

    def ungrouped(self) -> Table:
        """The same with heads that stand alone: `prompt tokens` for `prompt` under `tokens`."""
        heads, at = [], 0
        for group in self.groups or (Group("", len(self.heads)),):
            heads += [f"{head} {group.unit}".rstrip() for head in self.heads[at : at + group.columns]]
            at += group.columns
        return Table(tuple(heads), self.rows, self.names)

    def brief(self) -> Table:
        """The same without its details."""
        return self._only([at for at, head in enumerate(self.heads) if head not in self.details])

    def narrow(self, most: int) -> Iterator[Table]:
        """Ungrouped tables of these rows, each with the names and whole groups of at most `most` columns in all."""
        sizes = [group.columns for group in self.groups[1:]] or [len(self.heads) - self.names]
        alone, columns, at = self.ungrouped(), list[int](), self.names
        for size in sizes:
            if columns and len(columns) + size > most:
                yield alone._only([*range(self.names), *columns])
                columns = []
            columns += range(at, at + size)
            at += size
        yield alone._only([*range(self.names), *columns])

    def _only(self, columns: Sequence[int]) -> Table:
        rows = tuple(tuple(row[at] for at in columns) for row in self.rows)
        return Table(tuple(self.heads[at] for at in columns), rows, self.names)


def number(value: float | None) -> str:
    """Three significant digits or so, thousands apart."""
    if value is None:
        return NOTHING
    size = abs(value)
    if not size:
        return "0"
    if size < 0.001:
        return f"{value:.1e}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}".replace(",", THIN_SPACE)


def count(value: float) -> str:
    """A whole number, thousands apart by narrow spaces."""
    return f"{value:,.0f}".replace(",", THIN_SPACE)


def percent(part: float, whole: float) -> str:
    """A share, or nothing of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else NOTHING
