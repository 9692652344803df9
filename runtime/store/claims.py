"""Which runs of a store a process is at: a lock per run that the kernel frees when its holder dies."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...specializers.shelf.file_lock import locked_by_sqlite

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunClaims"]

FLOCK = "hhqqi4x"
"""`struct flock` of Linux: type, whence, start, length, process."""


class RunClaims:
    """Claims on the runs of one store, kept in the file `path` beside it: a run is its n-th byte, locked.

    Two drivers may so share a store. None keeps claims within this object, for stores in memory. Locks of open file
    descriptions where there are any (Linux): they hold between two stores of one process too. Without fcntl a run is
    a file of its own beside the store, for as long as it is claimed.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: int | None = None
        self._held: set[int] = set()

    @contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Claim a run for the length of the block; yields False at once when another process has it."""
        if number in self._held:
            yield False
            return
        if fcntl is None and self._path is not None:
            with _file_claim(Path(f"{self._path}-{number}")) as held:
                yield held
            return
        if not self._lock(number, True):
            yield False
            return
        self._held.add(number)
        try:
            yield True
        finally:
            self._held.discard(number)
            self._lock(number, False)

    def close(self) -> None:
        """Give all claims up; closing twice is harmless."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self, number: int, take: bool) -> bool:
        if self._path is None:
            return True
        if self._file is None:
            if not take:
                return True  # closed meanwhile, which has freed it
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if hasattr(fcntl, "F_OFD_SETLK"):
                kind = fcntl.F_WRLCK if take else fcntl.F_UNLCK
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(FLOCK, kind, os.SEEK_SET, number, 1, 0))
            else:
                flags = fcntl.LOCK_EX | fcntl.LOCK_NB if take else fcntl.LOCK_UN
                fcntl.lockf(self._file, flags, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        return True


@contextmanager
def _file_claim(path: Path) -> Iterator[bool]:
    """Hold a file that exists for as long as it is held; yields False when another holder has it."""
    with ExitStack() as holding:
        held = _lock_current(path, holding)
        if held:
            holding.callback(path.unlink, missing_ok=True)  # while it is still locked
        yield held


def _lock_current(path: Path, holding: ExitStack) -> bool:
    while True:
        path.touch()
        with ExitStack() as trying:
            try:
                before = path.stat().st_ino
                if not trying.enter_context(locked_by_sqlite(path)):
                    return False
                if path.stat().st_ino != before:
                    continue
            except FileNotFoundError:  # its last holder has just taken it away: what was locked then is nobody's
                continue
            holding.push(trying.pop_all())
            return True
