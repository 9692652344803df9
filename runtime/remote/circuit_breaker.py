"""A circuit breaker: after repeated failures no calls are made for a while, then one trial."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["CircuitBreaker"]


class CircuitBreaker:
    """Opens after `failures` in a row, stays open for `open_s` seconds, and closes when a trial then succeeds.

    It counts and calls nothing itself: the caller reports how calls ended, and makes the trial once it is due.
    (Nygard, Release It!, 2007.)
    """

    def __init__(self, *, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._opened_s: float | None = None

    @property
    def closed(self) -> bool:
        """Whether calls go through."""
        return self._opened_s is None

    @property
    def trial_due(self) -> bool:
        """Whether it has been open for long enough to try again (half-open)."""
        return self._opened_s is not None and self._clock() - self._opened_s >= self._open_s

    def failed(self) -> bool:
        """A call failed, or the trial did; True when that opens it."""
        was_closed = self.closed
        self._failures += 1
        if not was_closed or self._failures >= self._limit:
            self._opened_s = self._clock()
        return was_closed and not self.closed

    def succeeded(self) -> bool:
        """A call succeeded; True when that closes it."""
        was_open = not self.closed
        self._failures, self._opened_s = 0, None
        return was_open
