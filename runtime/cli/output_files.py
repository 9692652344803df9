"""Files that a command writes: checked before anything runs, and written with an error that names them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ...agents.errors import SettingsError
from ...agents.whole_files import write_whole
from ..console import say

__all__ = ["can_be_written", "write_output", "writing"]

P = TypeVar("P", Path, Path | None)


def can_be_written(path: P) -> P:
    """What an option names to be written, as a callback of it; raises SettingsError when that cannot work."""
    if path is None:
        return path
    folder = path.parent
    if path.is_dir():
        problem = "it is a folder"
    elif not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        problem = "it may not be written"
    else:
        return path
    raise _unwritten(path, problem)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where `path` is written; raises SettingsError when the disk is full, or it cannot be written."""
    try:
        yield
    except OSError as error:
        raise _unwritten(path, str(error)) from error


def write_output(path: Path, text: str) -> None:
    """Write a file whole or not at all, and say so; raises SettingsError when it cannot be written."""
    with writing(path):
        if path.exists() and not path.is_file():  # a pipe or a terminal
            path.write_text(text, encoding="utf-8")
        else:
            write_whole(path, text)
    say(f"wrote {path} ({len(text.encode()) / 1024:.0f} KiB)")


def _unwritten(path: Path, problem: str) -> SettingsError:
    return SettingsError(
        f"{path} cannot be written: {problem}",
        expected="a file in a folder that is there, on a disk with room",
        remedy="Name another file.",
    )
