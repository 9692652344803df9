"""Simulated time: a heap of what happens when."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """Runs events in order of time, those of one moment in the order in which they were set. `now_s` begins at 0."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        """Let something happen `delay_s` from now."""
        heapq.heappush(self._heap, (self.now_s + delay_s, next(self._numbers), event))

    def run(self) -> None:
        """Let everything happen, until nothing is left."""
        while self._heap:
            self.now_s, _, event = heapq.heappop(self._heap)
            self.events += 1
            event()
