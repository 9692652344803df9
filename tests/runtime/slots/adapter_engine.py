"""A fake engine for adapter slots: holds adapters, and complains at once when it is used wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio.lowlevel

from metier.agents.errors import AdapterError
from metier.runtime.slots.adapter import LoadedAdapter, SwapCost
from metier.runtime.slots.adapter_slots import AdapterSlots, OnAdapterUse
from metier.runtime.slots.slot_table import SlotTable

PATH = Path("adapter")


class FakeEngine:
    """Holds adapters, counts, and complains at once when it is asked for what a real engine could not do."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: dict[int, str] = {}
        self.in_use: dict[str, int] = {}
        self.numbers: list[int] = []
        self.bad: set[str] = set()
        self.moves: list[tuple[str, str]] = []
        self.spent_s = self.borne_s = 0.0

    async def load(self, adapter: LoadedAdapter) -> SwapCost:
        await anyio.lowlevel.checkpoint()
        self.numbers.append(adapter.number)
        assert adapter.number not in self.held and adapter.id not in self.held.values()
        assert len(self.held) < self.slots
        if adapter.id in self.bad:
            raise AdapterError(f"adapter {adapter.id} is broken")
        self.held[adapter.number] = adapter.id
        self.moves.append(("load", adapter.id))
        self.spent_s += 1.0
        await anyio.lowlevel.checkpoint()
        return SwapCost(wall_s=2.0, cpu_s=1.0)

    async def unload(self, adapter: LoadedAdapter) -> SwapCost:
        await anyio.lowlevel.checkpoint()
        assert not self.in_use.get(adapter.id)
        assert self.held.pop(adapter.number) == adapter.id
        self.moves.append(("unload", adapter.id))
        self.spent_s += 0.25
        await anyio.lowlevel.checkpoint()
        return SwapCost(wall_s=0.5, cpu_s=0.25)

    def make_slots(self, pass_limit: int = 32, on_use: OnAdapterUse | None = None, **rules: Any) -> AdapterSlots:
        table = SlotTable(self.slots, pass_limit=pass_limit, **rules)
        return AdapterSlots(table, load=self.load, unload=self.unload, on_use=on_use)

    async def work(self, slots: AdapterSlots, id: str, checkpoints: int = 1) -> tuple[int, float]:
        async with slots.use(id, PATH) as lease:
            assert self.held[lease.adapter.number] == id
            self.borne_s += lease.cpu_s
            self.in_use[id] = self.in_use.get(id, 0) + 1
            try:
                for _ in range(checkpoints):
                    await anyio.lowlevel.checkpoint()
                    assert self.held[lease.adapter.number] == id
            finally:
                self.in_use[id] -= 1
            return lease.swaps, lease.cpu_s
