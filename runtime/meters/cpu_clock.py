"""CPU seconds of one engine inside a process that also does other things."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
import time
from pathlib import Path

__all__ = ["ProcessesClock", "ThreadFamilyClock"]

_PR_SET_NAME = 15
_TASKS = Path("/proc/self/task")
_numbers = itertools.count(1)


class ThreadFamilyClock:
    """CPU time of the calling thread and of every thread started from it afterwards.

    The process clock would charge an engine with the work of the event loop beside it, and the thread clock
    would miss the OpenMP workers that do half the arithmetic. On Linux a thread inherits the name of the one
    that starts it, so a thread renamed before its first parallel region knows its family; each member has a
    kernel clock of its own. Elsewhere this is the process clock. Make it and read it in the same thread.
    """

    def __init__(self) -> None:
        self._name = f"metier-eng{next(_numbers)}"
        self._members: dict[int, float] = {}
        self._strangers: set[int] = set()
        self._ended_s = 0.0
        self._count = 0
        self._in_family = sys.platform == "linux" and self._rename()

    def read(self) -> float:
        """CPU seconds of the family since its threads began, those that have ended included."""
        if not self._in_family:
            return time.process_time()
        # The folder's link count is the number of threads; listing it costs twenty times as much.
        count = os.stat(_TASKS).st_nlink
        if count != self._count:
            self._count = count
            self._look_again()
        for tid in self._members:
            # The kernel's name for the clock of one thread: the thread id, inverted, over three flag bits.
            try:
                self._members[tid] = time.clock_gettime((~tid << 3) | 6)
            except OSError:
                self._count = 0  # ended since it was listed; its last reading stays
        return self._ended_s + sum(self._members.values())

    def _look_again(self) -> None:
        alive = {int(task) for task in os.listdir(_TASKS)}
        for gone in self._members.keys() - alive:
            self._ended_s += self._members.pop(gone)
        self._strangers &= alive
        for tid in alive - self._members.keys() - self._strangers:
            if self._is_member(tid):
                self._members[tid] = 0.0
            else:
                self._strangers.add(tid)

    def _rename(self) -> bool:
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.prctl(_PR_SET_NAME, self._name.encode(), 0, 0, 0) == 0)

    def _is_member(self, tid: int) -> bool:
        if tid == threading.get_native_id():
            return True
        try:
            return (_TASKS / str(tid) / "comm").read_text().strip() == self._name
        except OSError:
            return False


class ProcessesClock:
    """CPU time of several processes together, by their ids; those that have ended keep their last reading.

    Linux lets one process read another's CPU clock to the nanosecond; elsewhere, and for a process that is
    gone, the last reading stays.
    """

    def __init__(self, pids: tuple[int, ...]) -> None:
        self._readings = dict.fromkeys(pids, 0.0)
        self._last_s = 0.0

    def read(self) -> float:
        """CPU seconds of all of them since each began."""
        for pid in self._readings:
            # The kernel's name for the clock of a process: its id, inverted, over three flag bits.
            try:
                self._readings[pid] = time.clock_gettime((~pid << 3) | 2)
            except OSError:
                continue
        return sum(self._readings.values())

    def lap(self) -> float:
        """CPU seconds since the last lap."""
        now = self.read()
        lap, self._last_s = now - self._last_s, now
        return lap
