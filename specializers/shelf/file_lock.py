"""A lock between processes that share a folder; the kernel frees it when its holder dies."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

__all__ = ["exclusive", "locked_by_sqlite"]

WAIT_S = 7 * 24 * 3600.0
"""As long as SQLite is told to wait for a lock where there is no fcntl."""


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file while the block runs; yields False, at once, when not waiting and another holds it."""
    if fcntl is None:
        with locked_by_sqlite(path, wait=wait) as held:
            yield held
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked_by_sqlite(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """The same without fcntl: SQLite locks an empty file by whatever the system has."""
    with ExitStack() as stack:
        try:
            file = sqlite3.connect(path, timeout=WAIT_S if wait else 0.0, check_same_thread=False)
            stack.enter_context(closing(file))
            file.isolation_level = None
            file.execute("PRAGMA journal_mode = OFF")  # nothing is ever written
            file.execute("BEGIN EXCLUSIVE")
            held = True
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise OSError(f"{path} cannot be locked: {error}") from error
            held = False
        yield held
