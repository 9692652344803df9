"""Which runs of a store a process is at: a lock per run that the kernel frees when its holder dies."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["RunClaims"]

FLOCK = "hhqqi4x"
"""`struct flock` of Linux: type, whence, start, length, process."""


class RunClaims:
    """Claims on the runs of one store, kept in the file `path` beside it: a run is its n-th byte, locked.

    Two drivers may so share a store. None keeps claims within this object, for stores in memory. Locks of open file
    descriptions where there are any (Linux): they hold between two stores of one process too.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: int | None = None
        self._held: set[int] = set()

    @contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Claim a run for the length of the block; yields False at once when another process has it."""
        if number in self._held or not self._lock(number, fcntl.F_WRLCK):
            yield False
            return
        self._held.add(number)
        try:
            yield True
        finally:
            self._held.discard(number)
            self._lock(number, fcntl.F_UNLCK)

    def close(self) -> None:
        """Give all claims up; closing twice is harmless."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self, number: int, kind: int) -> bool:
        if self._path is None:
            return True
        if self._file is None:
            if kind == fcntl.F_UNLCK:
                return True  # closed meanwhile, which has freed it
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if hasattr(fcntl, "F_OFD_SETLK"):
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(FLOCK, kind, os.SEEK_SET, number, 1, 0))
            else:
                flags = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(self._file, flags, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        return True
