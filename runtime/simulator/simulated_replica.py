"""One replica on the simulated clock: an engine, and adapter slots by the rules that serve."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..slots.announced_uses import AnnouncedUses
from ..slots.slot_table import Resident, SlotGrant, SlotTable, SlotWaiter
from .clock import Clock
from .simulated_engine import EngineRow, SimulatedEngine

__all__ = ["SimulatedReplica"]

NOWHERE = Path()


class SimulatedReplica:
    """Takes asks in, brings their adapters into slots, and has the engine compute them.

    `announced` is what the runs have said about what they will use, None for the rule of the longest idle.
    `on_evicted` hears which adapter has left.
    """

    def __init__(
        self,
        clock: Clock,
        engine: SimulatedEngine,
        slots: SlotTable,
        *,
        load_s: float,
        evict_s: float,
        announced: AnnouncedUses | None = None,
        on_evicted: Callable[[str], None] | None = None,
    ) -> None:
        self.engine = engine
        self.loads = self.evictions = self.prefetches = 0
        self.announced = announced
        self._clock = clock
        self._slots = slots
        self._load_s = load_s
        self._evict_s = evict_s
        self._on_evicted = on_evicted or (lambda adapter: None)
        self._queued: dict[SlotWaiter[SlotGrant], EngineRow] = {}
        self._until_ready: dict[Resident, list[EngineRow]] = {}
        self._ahead: set[Resident] = set()

    def ask(self, row: EngineRow) -> None:
        """Compute a row; its `done` is called with it."""
        if row.adapter is None:
            self.engine.submit(row)
            return
        claim = self._slots.claim(row.adapter, NOWHERE)
        if isinstance(claim, SlotGrant):
            self._honour(claim, row)
        else:
            self._queued[claim] = row

    def announcements_changed(self) -> None:
        """Serve who waits, and fetch ahead what there is room for."""
        self._slots.announcements_changed()
        self._serve_queued()
        while (adapter := self._slots.next_prefetch()) is not None:
            grant = self._slots.claim_ahead(adapter, NOWHERE)
            if grant is None:
                return
            self.prefetches += 1
            self._honour(grant, None)

    def _honour(self, grant: SlotGrant, row: EngineRow | None) -> None:
        """Bring in what was granted, then compute the row; a prefetch has none, and gives its pin back."""
        resident = grant.resident
        if grant.loads:
            self._until_ready[resident] = []
            if grant.evicts is not None:
                self.engine.between_steps(self._evict_s, lambda: self._evicted(grant))
            else:
                self._load(grant)
        if row is None:
            self._ahead.add(resident)
        elif resident.ready.is_set():
            self._compute(row, resident)
        else:
            self._until_ready[resident].append(row)

    def _evicted(self, grant: SlotGrant) -> None:
        assert grant.evicts is not None
        self.evictions += 1
        self._slots.evicted(grant)
        self._on_evicted(grant.evicts.adapter.id)
        # Who loads hears of it from the engine's thread, which has gone on to its next step by then.
        self._clock.after(0.0, lambda: self._load(grant))

    def _load(self, grant: SlotGrant) -> None:
        self.engine.between_steps(self._load_s, lambda: self._loaded(grant))

    def _loaded(self, grant: SlotGrant) -> None:
        resident = grant.resident
        self.loads += 1
        self._slots.loaded(grant)
        for row in self._until_ready.pop(resident):
            self._clock.after(0.0, partial(self._compute, row, resident))
        if resident in self._ahead:
            self._ahead.discard(resident)
            self._slots.release(resident)
        self._serve_queued()

    def _compute(self, row: EngineRow, resident: Resident) -> None:
        done = row.done

        def release(row: EngineRow) -> None:
            self._slots.release(resident)
            self._serve_queued()
            done(row)

        row.done = release
        self.engine.submit(row)

    def _serve_queued(self) -> None:
        for waiter in [waiter for waiter in self._queued if waiter.grant is not None]:
            assert waiter.grant is not None
            self._honour(waiter.grant, self._queued.pop(waiter))
