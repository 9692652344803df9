"""The engines of a session: started once, when they are first needed, and what they counted while each batch ran."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from ..meters.energy import EnergyMeter
from ..store.store import RunStore

__all__ = ["SessionEngines"]


class SessionEngines:
    """Starts what answers a session's asks, and records its counters and the machine's energy with each batch.

    `start` starts the engines, None where there is nothing to start; `totals` are their counters (`EnginePool.totals`).
    """

    def __init__(
        self,
        store: RunStore,
        start: Callable[[], Awaitable[None]] | None = None,
        totals: Callable[[], dict[str, dict[str, Any]]] | None = None,
    ) -> None:
        self._store = store
        self._start = start
        self._totals = totals
        self._starting = anyio.Lock()
        self._id = uuid.uuid4().hex[:6]
        self._energy: dict[str, EnergyMeter] = {}

    def totals(self) -> dict[str, dict[str, Any]]:
        """Engine name → its own counters; empty where there are none."""
        return {} if self._totals is None else self._totals()

    async def start(self) -> None:
        """Start the engines unless they are started; who comes second waits for the first.

        Raises: EngineError, EngineDeadError; then the next call tries again.
        """
        if self._start is None:
            return
        async with self._starting:
            if self._start is not None:
                await self._start()
                self._start = None
                for meter in self._energy.values():  # what a start draws is no batch's
                    meter.start()

    def begin(self, batch: str) -> None:
        """A batch begins, or goes on."""
        self._energy[batch] = EnergyMeter()
        self._energy[batch].start()

    def record(self, batch: str) -> None:
        """Keep with a batch what the engines and the machine's meters have counted."""
        energy = self._energy.pop(batch).take() if batch in self._energy else None
        if energy is not None:
            self._store.record_energy(batch, energy)
        for engine, totals in self.totals().items():
            self._store.record_engine_totals(batch, f"{engine}@{self._id}", totals)
