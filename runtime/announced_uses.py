"""Which adapters the runs will use next, and how soon: what an engine's slots know of the future."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

__all__ = ["AnnouncedUses"]


class AnnouncedUses:
    """Announcements of all runs on one engine: adapter id → asks until that run may use it.

    0 is the step that has begun (it may have the adapter already, or be about to ask for it), 1 the run's next ask.
    They outlive an engine that dies: the runs go on with the one that takes its place.
    """

    def __init__(self) -> None:
        self._by_run: dict[str, Mapping[str, int]] = {}

    def announce(self, run_id: str, uses: Mapping[str, int]) -> None:
        """Replace what is known of a run."""
        if uses:
            self._by_run[run_id] = uses
        else:
            self._by_run.pop(run_id, None)

    def forget(self, run_id: str) -> None:
        """Drop what is known of a run; harmless when there is nothing."""
        self._by_run.pop(run_id, None)

    def distance(self, id: str) -> float:
        """Asks until some run may use the adapter, infinity when none has said so."""
        return min((uses[id] for uses in self._by_run.values() if id in uses), default=math.inf)

    def within(self, asks: int) -> Iterator[str]:
        """Adapters that nobody asks for yet and somebody may within so many asks, nearest first."""
        nearest: dict[str, int] = {}
        for uses in self._by_run.values():
            for id, distance in uses.items():
                if distance <= asks:
                    nearest[id] = min(distance, nearest.get(id, distance))
        return iter(sorted((id for id in nearest if nearest[id] > 0), key=nearest.__getitem__))
