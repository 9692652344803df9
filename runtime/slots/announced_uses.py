"""Announced adapter uses: which adapters the runs will use next, and how soon."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["AnnouncedUses"]


class AnnouncedUses:
    """Announcements of all runs on one engine: adapter id → asks until that run may use it.

    0 is the step that has begun (it may have the adapter already, or be about to ask for it), 1 the run's next ask.
    They are kept when an engine dies, since the runs go on with the next one.
    """

    def __init__(self) -> None:
        self._by_run: dict[str, Mapping[str, int]] = {}
        # Adapter id → distance → number of runs; kept up to date with each announcement, because there may be hundreds
        # of runs, and the slots ask at every step of each.
        self._runs_at: dict[str, dict[int, int]] = {}

    def announce(self, run_id: str, uses: Mapping[str, int]) -> None:
        """Replace what a run has announced."""
        before = self._by_run.get(run_id)
        if before is uses:
            return
        for id, distance in (before or {}).items():
            runs_at = self._runs_at[id]
            runs_at[distance] -= 1
            if not runs_at[distance]:
                del runs_at[distance]
                if not runs_at:
                    del self._runs_at[id]
        for id, distance in uses.items():
            runs_at = self._runs_at.setdefault(id, {})
            runs_at[distance] = runs_at.get(distance, 0) + 1
        if uses:
            self._by_run[run_id] = uses
        else:
            self._by_run.pop(run_id, None)

    def forget(self, run_id: str) -> None:
        """Drop what a run has announced, if anything."""
        self.announce(run_id, {})

    def distance(self, id: str) -> float:
        """Asks until some run may use the adapter, infinity when none has announced it."""
        return min(self._runs_at.get(id, ()), default=math.inf)

    def within(self, asks: int) -> list[str]:
        """Adapters announced within `asks` asks and not wanted yet, nearest first."""
        nearest = {id: min(runs_at) for id, runs_at in self._runs_at.items()}
        return sorted((id for id, distance in nearest.items() if 0 < distance <= asks), key=nearest.__getitem__)
