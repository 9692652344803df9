"""How many threads compute: threads that wait for each other on a busy machine take minutes for seconds of work."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .measured_speed import known_speed

__all__ = ["ThreadCount", "computing_on", "engine_threads", "others_busy", "training_threads", "usable_cores"]

GIVEN = os.environ.get("OMP_NUM_THREADS", "")
"""What the user set; engines set this variable too, later and for themselves."""
SAMPLE_S = 0.3
"""How long the machine is watched for what other programs use."""
SHARED_CORE = 0.2
"""A core that other programs use for no more than this share of the time counts as free."""


@dataclass(frozen=True)
class ThreadCount:
    """A number of threads, and why it is this one."""

    threads: int
    reason: str

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)} ({self.reason})"


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(_our_cores())


def _our_cores() -> set[int]:
    """Their numbers; all there are where the system does not say which (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def training_threads(asked: int | None) -> ThreadCount:
    """Threads to train on: `asked`, else OMP_NUM_THREADS, else the cores that other programs leave free right now."""
    if asked is not None:
        return ThreadCount(asked, "it is set")
    if GIVEN.isdigit() and int(GIVEN) > 0:
        return ThreadCount(int(GIVEN), "OMP_NUM_THREADS says so")
    cores, busy = usable_cores(), others_busy()
    free = max(1, math.floor(cores - busy + SHARED_CORE))
    speed = known_speed()
    if speed is not None:
        best = speed.threads_worth(speed.training)
        if best is not None and best < free:
            return ThreadCount(best, f"more are hardly faster, measured on {speed.base_name}, {speed.day}")
    return ThreadCount(free, f"other programs use {busy:.1f} of {cores} cores right now")


def engine_threads(asked: int | None) -> ThreadCount:
    """Threads of an engine: `asked`, else as many as were measured to be worth it on a quiet machine, else all."""
    if asked is not None:
        return ThreadCount(asked, "it is set")
    cores, speed = usable_cores(), known_speed()
    if speed is not None:
        best = speed.threads_worth(speed.engine)
        if best is not None and best < cores:
            return ThreadCount(best, f"more are hardly faster, measured on {speed.base_name}, {speed.day}")
    return ThreadCount(cores, "all that this process may use")


@contextlib.contextmanager
def computing_on(threads: int) -> Iterator[None]:
    """Within, torch computes on so many threads in this thread."""
    # vLLM's CPU worker replaces torch.set_num_threads for the whole process by a function that does nothing.
    from torch._C import get_num_threads, set_num_threads  # type: ignore[attr-defined]  # not in its stubs

    before = get_num_threads()
    set_num_threads(threads)
    try:
        yield
    finally:
        set_num_threads(before)


def others_busy(seconds: float = SAMPLE_S) -> float:
    """How many of the processors that we may use other processes keep busy, over so many seconds; 0 without /proc."""
    own, busy, began = time.process_time(), _busy_s(), time.monotonic()
    time.sleep(seconds)
    used_s = _busy_s() - busy - (time.process_time() - own)
    return max(0.0, used_s / (time.monotonic() - began))


def _busy_s() -> float:
    """CPU-seconds that all programs have used on these processors since the machine started."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    ours = {f"cpu{number}" for number in _our_cores()}
    # user, nice and system; what a guest takes is in user already.
    ticks = sum(sum(map(int, line.split()[1:4])) for line in lines if line.split()[:1] and line.split()[0] in ours)
    return ticks / os.sysconf("SC_CLK_TCK")
