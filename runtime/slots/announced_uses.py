"""Which adapters the runs will use next, and how soon: what an engine's slots know of the future."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["AnnouncedUses"]


class AnnouncedUses:
    """Announcements of all runs on one engine: adapter id → asks until that run may use it.

    0 is the step that has begun (it may have the adapter already, or be about to ask for it), 1 the run's next ask.
    They outlive an engine that dies: the runs go on with the one that takes its place.
    """

    def __init__(self) -> None:
        self._by_run: dict[str, Mapping[str, int]] = {}
        # Adapter id → distance → how many runs say so; kept as announcements come, because there may be hundreds
        # of runs, and the slots ask at every step of each.
        self._runs_at: dict[str, dict[int, int]] = {}

    def announce(self, run_id: str, uses: Mapping[str, int]) -> None:
        """Replace what is known of a run."""
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
        """Drop what is known of a run; harmless when there is nothing."""
        self.announce(run_id, {})

    def distance(self, id: str) -> float:
        """Asks until some run may use the adapter, infinity when none has said so."""
        return min(self._runs_at.get(id, ()), default=math.inf)

    def within(self, asks: int) -> list[str]:
        """Adapters that nobody asks for yet and somebody may within so many asks, nearest first."""
        nearest = {id: min(runs_at) for id, runs_at in self._runs_at.items()}
        return sorted((id for id, distance in nearest.items() if 0 < distance <= asks), key=nearest.__getitem__)
