"""Work of each engine of a pool between readings, kept in a journal so that its costs can be fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...router.probing.journal import Journal, record_key
from ...router.probing.profile import TokenCost
from ...router.solving.engine_work import EngineWork, busy_seconds_per_cpu_s, fit_engine_cost

__all__ = ["WorkMeter"]

COUNTED = ("steps", "prefill_tokens", "decode_tokens", "cpu_s", "busy_s")


class WorkMeter:
    """Writes to a journal what engines have done since the last call.

    `totals` maps each engine's checkpoint to its counters so far.
    """

    def __init__(self, totals: Callable[[], Mapping[str, Mapping[str, Any]]], work: Journal[EngineWork]) -> None:
        self._totals = totals
        self._work = work
        self._before = self._counted()

    def note(self) -> None:
        """Add a record of the work since the last call for each engine that made a step."""
        now = self._counted()
        for checkpoint, counters in now.items():
            before = self._before.get(checkpoint, {})
            done = {name: max(value - before.get(name, 0), 0) for name, value in counters.items()}
            if done["steps"] > 0:
                key = record_key(number=len(self._work), checkpoint=checkpoint, **done)
                self._work.add(EngineWork(key=key, checkpoint=checkpoint, **done))
        self._before = now

    def costs(self) -> dict[str, TokenCost]:
        """The cost of a prompt token, of a written token and of a step, for each checkpoint with enough work to fit
        them."""
        by_checkpoint: dict[str, list[EngineWork]] = {}
        for _, work in self._work.items():
            by_checkpoint.setdefault(work.checkpoint, []).append(work)
        found = {checkpoint: fit_engine_cost(work) for checkpoint, work in by_checkpoint.items()}
        return {checkpoint: cost for checkpoint, cost in found.items() if cost is not None}

    def busy_s_per_cpu_s(self) -> float | None:
        """How long the engines' steps took for each CPU-second they used; None while that is not known."""
        return busy_seconds_per_cpu_s([work for _, work in self._work.items()])

    def _counted(self) -> dict[str, dict[str, Any]]:
        return {
            checkpoint: {name: counters[name] for name in COUNTED} for checkpoint, counters in self._totals().items()
        }
