"""Files and folders that a command writes: tried before anything runs, and written with an error that names them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..agents.errors import SettingsError
from ..agents.whole_files import try_file, try_folder, write_whole
from .console import say

__all__ = ["can_be_written", "can_hold_files", "new_folder", "write_output", "writing"]

P = TypeVar("P", Path, Path | None)


def can_be_written(path: P) -> P:
    """A file that an option names to be written, as a callback of it; raises SettingsError when that cannot work."""
    if path is None:
        return path
    if not os.path.isdir(path.parent):
        raise _unwritten(path, f"there is no folder {path.parent}")
    with writing(path):
        try_file(path)
    return path


def can_hold_files(path: P) -> P:
    """A folder that an option names, there or not, for files to be written in; as `can_be_written`."""
    if path is None:
        return path
    try:
        try_folder(path)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot hold files: {error.strerror or error}",
            expected="a folder, new or there, on a disk with room",
            remedy="Name another folder.",
        ) from error
    return path


def new_folder(path: Path) -> Path:
    """A folder that an argument names to be made; as `can_be_written`, and it must not be there yet."""
    if os.path.lexists(path):
        raise SettingsError(f"{path} exists", expected="a new folder", remedy="Remove it, or choose another.")
    return can_hold_files(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where `path` is written; raises SettingsError when the disk is full, or it cannot be written."""
    try:
        yield
    except OSError as error:
        raise _unwritten(path, error.strerror or str(error)) from error


def write_output(path: Path, text: str) -> None:
    """Write a file whole or not at all, and say so; raises SettingsError when it cannot be written."""
    with writing(path):
        write_whole(path, text)
    say(f"wrote {path} ({len(text.encode()) / 1024:.0f} KiB)")


def _unwritten(path: Path, problem: str) -> SettingsError:
    return SettingsError(
        f"{path} cannot be written: {problem}",
        expected="a file in a folder that is there, on a disk with room",
        remedy="Name another file.",
    )
