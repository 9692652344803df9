"""Files and folders that appear under their name whole or not at all, whenever a process is killed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["try_file", "try_folder", "whole_file", "whole_folder", "write_whole"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it replaces `path` at the end, or is gone after an error.

    What a kill leaves of it is overwritten by the next writer, so one process at a time may write a file. A pipe or a
    device is never replaced: it is written to as it is.
    """
    if _is_special(path):
        yield path
        return
    part = _part_of(path)
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text; raises OSError when it cannot be written, and then leaves the file as it was."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to make a folder at; at the end it becomes `path`, or after an error is gone.

    `path` must not exist. The name to write at starts with a dot, so it is not listed, and is unique, so that several
    processes may write at once.
    """
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield part
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def try_file(path: Path) -> None:
    """Raise the OSError that `whole_file` would end with where `path` cannot be written, and leave nothing behind."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it may not be written", str(path))
        return
    part = _part_of(path)
    left_by_a_kill = os.path.lexists(part)
    part.open("ab").close()
    if not left_by_a_kill:
        part.unlink()


def try_folder(path: Path) -> None:
    """Raise the OSError with which files could not be written in the folder `path`, there or new; nothing is left."""
    new = [place for place in (path, *path.parents) if not os.path.lexists(place)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    finally:
        for place in new:
            with suppress(OSError):
                place.rmdir()


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, a terminal or another device."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
