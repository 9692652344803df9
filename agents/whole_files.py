"""Files and folders that appear under their name whole or not at all, whenever a process is killed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole_file", "whole_folder", "write_whole"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it replaces `path` at the end, or is gone after an error.

    What a kill leaves of it is overwritten by the next writer, so one process at a time may write a file.
    """
    part = path.with_name(f"{path.name}.part")
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
