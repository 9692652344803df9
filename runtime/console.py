"""Where the command line writes: answers and tables on stdout, progress and notes on stderr."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["ERR", "OUT", "StepBar", "on_terminal", "say", "show", "show_markdown"]

OUT = Console()
ERR = Console(stderr=True)
FILE_COLUMNS = 200
"""Columns of a table that does not go to a terminal: enough that no cell of ours is folded."""

LINES = 20
"""Lines of progress, evenly spread, where there is no terminal to draw a bar on."""


def say(text: str, *, style: str | None = None) -> None:
    """Write one note on stderr, as it is: nothing in it is markup, and no line is broken where there is no terminal."""
    ERR.print(text, style=style, markup=False, soft_wrap=True)


def on_terminal() -> bool:
    """Whether stderr is a terminal: what a program waits for is nothing for its log."""
    return ERR.is_terminal


def show(table: Table | str) -> None:
    """Write a table or a line of an answer on stdout: a table as wide as the terminal, or as wide as it is."""
    if isinstance(table, str):
        OUT.print(table, markup=False, soft_wrap=True)
    elif OUT.is_terminal:
        OUT.print(table)
    else:
        Console(file=OUT.file, width=FILE_COLUMNS).print(table)


def show_markdown(text: str) -> None:
    """Write Markdown on stdout: drawn on a terminal, as it is anywhere else."""
    if OUT.is_terminal:
        OUT.print(Markdown(text))
    else:
        OUT.file.write(text)


class StepBar:
    """Progress of something whose steps are counted: a bar on a terminal, at most about `LINES` lines anywhere else."""

    def __init__(self, title: str, unit: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=ERR, disable=not ERR.is_terminal, transient=True)
        self._title, self._unit = title, unit
        self._task = self._bars.add_task(title, total=None)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def show(self, done: int, total: int, *what: str) -> None:
        """Say how many steps are done, and `what` else is known."""
        self._bars.update(self._task, description=", ".join((self._title, *what)), completed=done, total=total)
        if not ERR.is_terminal and (done % max(1, total // LINES) == 0 or done == total):
            say(", ".join((f"{self._title}: {done} of {total} {self._unit}", *what)))
