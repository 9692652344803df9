"""An engine's adapter slots: carries out the moves that the slot table decides; asks wait here for a slot."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio

from ...agents.errors import MetierError
from .adapter import LoadedAdapter, SwapCost
from .announced_uses import AnnouncedUses
from .slot_table import AdapterLease, SlotGrant, SlotTable

__all__ = ["AdapterLease", "AdapterMove", "AdapterSlots", "OnAdapterMove", "OnAdapterUse"]

AdapterMove = Callable[[LoadedAdapter], Awaitable[SwapCost]]
OnAdapterMove = Callable[[str, LoadedAdapter, SwapCost], None]
OnAdapterUse = Callable[[Literal["began", "ended"], str], None]


class AdapterSlots:
    """The adapters of one engine: at most `slots` resident, those in use pinned, one of the idle ones evicted.

    `load` and `unload` call the engine. An adapter in use is never unloaded, and a new one is loaded only after the one
    it replaces was unloaded, so the engine never holds more than `slots`. Asks without a slot wait in a queue. Others
    may overtake the first of them, but only `pass_limit` times; after that new asks queue behind it, so that pins are
    given back and the first is served.

    Without `announced` the longest idle adapter is evicted, the queue is served in order, and only asks for a
    resident adapter overtake. With it, the uses that runs have announced decide:

    - the adapter whose next announced use is furthest is evicted, unannounced ones first (the longest idle of
      them): Belady's rule;
    - an adapter that some run uses within `pin_asks` asks stays, and asks that want its slot wait, unless no adapter
      is in use at all or the first in the queue has been overtaken `pass_limit` times;
    - a free slot goes to the adapter that most asks wait for, so that they run together;
    - `prefetch` loads an adapter announced within `prefetch_asks` asks, when a slot is empty or holds an adapter that
      is not announced within `sure_asks` asks (further announcements are guesses). Evicting a nearer one would only
      move a load forward, and often cause a second one.

    Numbers are given here only, one per content id, and a number whose load failed is never given again
    (vLLM may keep a half-loaded adapter under it). One event loop at a time.
    """

    def __init__(
        self,
        slots: int,
        *,
        load: AdapterMove,
        unload: AdapterMove,
        pass_limit: int = 32,
        announced: AnnouncedUses | None = None,
        pin_asks: int = 2,
        prefetch_asks: int = 1,
        sure_asks: int = 16,
        on_move: OnAdapterMove | None = None,
        on_use: OnAdapterUse | None = None,
    ) -> None:
        self._table = SlotTable(
            slots,
            pass_limit=pass_limit,
            announced=announced,
            pin_asks=pin_asks,
            prefetch_asks=prefetch_asks,
            sure_asks=sure_asks,
        )
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
