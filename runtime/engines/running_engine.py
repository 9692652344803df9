"""One running engine with its adapter slots: leases for asks, prefetch, and the cost of both."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...agents.backend import Prefetch, ResumedText
from ...agents.errors import AdapterError, NotFiniteError
from ...agents.messages import Ask, Reply, Usage, add_usage
from ..settings.engine import EngineSettings
from ..slots.adapter import LoadedAdapter, SwapCost
from ..slots.adapter_slots import AdapterSlots, OnAdapterMove, OnAdapterUse
from ..slots.announced_uses import AnnouncedUses
from ..slots.slot_table import AdapterLease, SlotTable
from .engine import Engine, EngineCounters, EngineRequest, OnAbandoned
from .variant_targets import VariantTarget

__all__ = ["RunningEngine"]

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class RunningEngine:
    """An engine and the slots that decide which adapters it holds.

    `announced` holds the adapters that the runs have announced; the pool owns it, because it outlives this engine.
    `on_abandoned` is called with the cost of swaps that no reply took.
    """

    def __init__(
        self,
        engine: Engine,
        settings: EngineSettings,
        announced: AnnouncedUses,
        *,
        on_move: OnAdapterMove | None = None,
        on_use: OnAdapterUse | None = None,
        on_abandoned: OnAbandoned | None = None,
    ) -> None:
        self.engine = engine
        self._on_abandoned = on_abandoned
        table = SlotTable(
            settings.adapter_slots,
            pass_limit=settings.adapter_pass_asks,
            announced=announced if settings.foresight else None,
            pin_asks=settings.pin_asks,
            prefetch_asks=settings.prefetch_asks,
            sure_asks=settings.foresight_asks,
        )
        self._quarantined: dict[str, str] = {}
        self._slots = AdapterSlots(table, load=self._load, unload=engine.remove_adapter, on_move=on_move, on_use=on_use)

    @property
    def prefetches(self) -> int:
        """Adapters loaded before an ask needed them."""
        return self._slots.prefetches

    def counters(self) -> EngineCounters:
        """The engine's counters; loads and evictions that no ask is charged for are overhead."""
        counters = self.engine.counters()
        return replace(counters, overhead_cpu_s=counters.overhead_cpu_s + self._slots.unclaimed_cpu_s)

    @asynccontextmanager
    async def lease(self, id: str, path: Path, ask: Ask) -> AsyncGenerator[AdapterLease]:
        """Hold an adapter in a slot for an ask. A caller that charges the swap's cost sets the lease's `swaps` to 0."""
        async with self._slots.use(id, path) as lease:
            try:
                yield lease
            finally:
                if lease.swaps:  # no reply took it
                    self.engine.write_off(ask.role, lease.cpu_s)
                    if self._on_abandoned is not None:
                        self._on_abandoned(ask, Usage(swaps=lease.swaps, swap_s=lease.swap_s, cpu_s=lease.cpu_s))

    async def ask(
        self, target: VariantTarget, ask: Ask, on_text: ResumedText | None = None, waited_s: float = 0.0
    ) -> Reply:
        """Ask the engine, with the target's adapter in a slot; waiting for room (`waited_s`) and slot is queueing.

        Raises: what `Engine.generate` and `Engine.add_adapter` raise; AdapterError for an adapter in quarantine, since
        an earlier ask of it was not finite.
        """
        engine, on_abandoned = self.engine, self._on_abandoned
        if target.adapter is None or target.variant is None:
            reply = await engine.generate(EngineRequest(ask, on_abandoned=on_abandoned), on_text)
            return reply.model_copy(update={"usage": add_usage(reply.usage, queue_s=waited_s)})
        if target.variant.id in self._quarantined:
            raise AdapterError(
                f"variant {target.variant.name!r} is not asked any more: {self._quarantined[target.variant.id]}",
                expected="a variant whose values are finite",
                remedy="Make it again with a lower learning_rate, or assign another variant.",
            )
        began_s = time.monotonic()
        async with self.lease(target.variant.id, target.adapter, ask) as lease:
            slot_wait_s = max(time.monotonic() - began_s - lease.swap_s, 0.0)
            request = EngineRequest(ask, lease.adapter, target.intuition(ask), on_abandoned)
            try:
                reply = await engine.generate(request, on_text)
            except NotFiniteError as error:
                self._quarantined[target.variant.id] = error.problem
                raise
            swap = {"swaps": lease.swaps, "swap_s": lease.swap_s, "cpu_s": lease.cpu_s}
            lease.swaps, lease.cpu_s = 0, 0.0  # charged
            wait = {"queue_s": waited_s + slot_wait_s, "slot_wait_s": slot_wait_s}
            return reply.model_copy(update={"usage": add_usage(reply.usage, **wait, **swap)})

    def foresee(self, paths: Mapping[str, Path]) -> Prefetch | None:
        """Call when announcements have changed; returns the prefetch to run, None when nothing is due."""
        self._slots.announcements_changed()
        return partial(self._slots.prefetch, paths) if self._slots.next_prefetch() in paths else None

    async def _load(self, adapter: LoadedAdapter) -> SwapCost:
        # Checked again: it was checked when it was first asked for, and may have been evicted since.
        missing = [name for name in ADAPTER_FILES if not (adapter.path / name).is_file()]
        if missing:
            raise AdapterError(
                f"adapter {adapter.id!r} is gone from {adapter.path}: {' and '.join(missing)} missing",
                expected="the files it had when it was checked, for as long as runs may ask for it",
                remedy="Put the variant's folder back, or make it again from its recipe: it gets the same id.",
            )
        return await self.engine.add_adapter(adapter)
