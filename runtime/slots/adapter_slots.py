"""An engine's adapter slots: carries out the moves that the slot table decides; asks wait here for a slot."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio

from ...agents.errors import MetierError
from .adapter import LoadedAdapter, SwapCost
from .slot_table import AdapterLease, SlotGrant, SlotTable

__all__ = ["AdapterLease", "AdapterMove", "AdapterSlots", "OnAdapterMove", "OnAdapterUse"]

AdapterMove = Callable[[LoadedAdapter], Awaitable[SwapCost]]
OnAdapterMove = Callable[[str, LoadedAdapter, SwapCost], None]
OnAdapterUse = Callable[[Literal["began", "ended"], str], None]


class AdapterSlots:
    """The adapters of one engine: those in use pinned, the others kept until `table` gives their slot away.

    `load` and `unload` call the engine; `on_move` hears of both, `on_use` when an ask begins and ends to hold an
    adapter. One event loop at a time.
    """

    def __init__(
        self,
        table: SlotTable,
        *,
        load: AdapterMove,
        unload: AdapterMove,
        on_move: OnAdapterMove | None = None,
        on_use: OnAdapterUse | None = None,
    ) -> None:
        self._table = table
        self._load = load
        self._unload = unload
        self._on_move = on_move or (lambda kind, adapter, cost: None)
        self._on_use = on_use or (lambda kind, id: None)
        self.prefetches = 0
        self.unclaimed_cpu_s = 0.0
        """CPU seconds of loads and evictions not charged to any ask: failed ones, and prefetches not used so far."""

    @property
    def resident(self) -> tuple[str, ...]:
        """Content ids of the adapters that are in a slot now."""
        return self._table.resident

    @asynccontextmanager
    async def use(self, id: str, path: Path) -> AsyncIterator[AdapterLease]:
        """Hold adapter `id` in a slot for the length of the block, loading it from `path` first if need be.

        Raises: what the engine raises when it refuses the adapter (AdapterError); every ask that waited for
        the same load gets it.
        """
        grant = await self._wait_grant(id, path)
        try:
            lease = await self._honour(grant)
            self._on_use("began", id)
            try:
                yield lease
            finally:
                self._on_use("ended", id)
        finally:
            self._table.release(grant.resident)

    # --- prefetch -----------------------------------------------------------------------------------------

    def next_prefetch(self) -> str | None:
        """The announced adapter that `prefetch` would load now, None when there is none or no slot for it."""
        return self._table.next_prefetch()

    async def prefetch(self, paths: Mapping[str, Path]) -> None:
        """Load announced adapters while there are free slots; `paths` maps the known adapters to their folders.

        A load that fails raises nothing here: the ask that needs the adapter tries again and gets the error. The cost
        is charged to the first ask that uses the adapter, and stays in `unclaimed_cpu_s` when none does.
        """
        while (id := self.next_prefetch()) is not None and id in paths:
            grant = self._table.claim_ahead(id, paths[id])
            if grant is None:
                return
            self.prefetches += 1
            await self._leave_unclaimed(grant)

    def announcements_changed(self) -> None:
        """Grant what waited for slots that were kept for uses no longer announced."""
        self._table.announcements_changed()

    # --- grants -------------------------------------------------------------------------------------------

    async def _wait_grant(self, id: str, path: Path) -> SlotGrant:
        claim = self._table.claim(id, path)
        if isinstance(claim, SlotGrant):
            return claim
        try:
            await claim.turn.wait()
        except BaseException:
            if claim.grant is None:
                self._table.withdraw(claim)
            else:
                # Cancelled between the grant and its use; other asks may already wait for this load.
                with anyio.CancelScope(shield=True):
                    await self._leave_unclaimed(claim.grant)
            raise
        assert claim.grant is not None
        return claim.grant

    async def _honour(self, grant: SlotGrant) -> AdapterLease:
        """Make the pinned adapter usable: load it, or wait for the ask that does."""
        resident, lease = grant.resident, AdapterLease(grant.resident.adapter)
        if grant.loads:
            # Finished even when the ask is cancelled: others may wait for this load already.
            with anyio.CancelScope(shield=True):
                await self._bring_in(grant, lease)
        else:
            await resident.ready.wait()
        if resident.error is not None:
            error = resident.error
            if isinstance(error, MetierError):
                raise type(error)(error.problem, expected=error.expected, remedy=error.remedy) from error
            raise error
        if resident.unclaimed is not None:
            lease.swaps, lease.cpu_s = resident.unclaimed.swaps, resident.unclaimed.cpu_s
            self.unclaimed_cpu_s -= lease.cpu_s
            resident.unclaimed = None
        return lease

    async def _leave_unclaimed(self, grant: SlotGrant) -> None:
        """Carry out the grant of a cancelled ask, for others that may wait for it; the first to use it is charged."""
        resident = grant.resident
        try:
            lease = await self._honour(grant)
        except MetierError:
            return  # asks that wait for the same load get the error
        else:
            if lease.swaps:
                resident.unclaimed = lease
                self.unclaimed_cpu_s += lease.cpu_s
        finally:
            self._table.release(resident)

    async def _bring_in(self, grant: SlotGrant, lease: AdapterLease) -> None:
        try:
            if grant.evicts is not None:
                leaving = grant.evicts.adapter
                cost = await self._unload(leaving)
                self._table.evicted(grant)
                lease.charge(cost)
                self._on_move("adapter_evicted", leaving, cost)
            cost = await self._load(grant.resident.adapter)
            lease.swaps += 1
            lease.charge(cost)
            self._on_move("adapter_loaded", grant.resident.adapter, cost)
        except BaseException as error:
            self.unclaimed_cpu_s += lease.cpu_s
            self._table.failed(grant, error)
        else:
            self._table.loaded(grant)
