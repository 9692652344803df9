"""An engine's adapter slots: what the table decides is carried out here, and asks wait for their turn."""

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

    `load` and `unload` reach the engine; an adapter in use is never unloaded and a new one comes in only after
    the one it replaces has left, so the engine never holds more than `slots`. Asks whose adapter finds no room
    wait. Others may overtake the first of them, but only `pass_limit` times; after that newcomers queue behind,
    pins run out, and the first is served.

    Without `announced` the longest idle adapter is evicted, the queue is served in order, and only asks for a
    resident adapter overtake. With it, the future is known as far as the runs have announced it:

    - evicted is the adapter whose next announced use is furthest, unannounced ones first (the longest idle of
      them): Belady's rule;
    - an adapter that some run uses within `pin_asks` asks stays, and who wants its slot waits, unless no adapter
      is in use at all or the first in the queue has been overtaken `pass_limit` times;
    - a slot that becomes free goes to the adapter that most asks wait for, so that its work runs together;
    - `prefetch` brings in what is announced within `prefetch_asks` asks when a slot is empty or holds an adapter
      that nobody has announced within `sure_asks` asks, beyond which are guesses. Anything else would only move a
      load forward, and often make two of it.

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
        """CPU seconds of loads and evictions that no ask bears: failed ones, and prefetches not used so far."""

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
        """The announced adapter that `prefetch` would bring in now, None when there is none or no slot for it."""
        return self._table.next_prefetch()

    async def prefetch(self, paths: Mapping[str, Path]) -> None:
        """Bring in announced adapters while there are slots to spare; `paths` are the folders of those known.

        A load that fails is no error here: the ask that needs the adapter tries again and is told. The cost goes
        to the first ask that uses the adapter, and stays in `unclaimed_cpu_s` when none does.
        """
        while (id := self.next_prefetch()) is not None and id in paths:
            grant = self._table.claim_ahead(id, paths[id])
            if grant is None:
                return
            self.prefetches += 1
            await self._leave_unclaimed(grant)

    def announcements_changed(self) -> None:
        """Someone may be waiting for a slot that was kept for an announced use which is off now."""
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
                # Cancelled between the grant and its use; others may be counting on the load by now.
                with anyio.CancelScope(shield=True):
                    await self._leave_unclaimed(claim.grant)
            raise
        assert claim.grant is not None
        return claim.grant

    async def _honour(self, grant: SlotGrant) -> AdapterLease:
        """Make the pinned adapter usable: bring it in, or wait for who does."""
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
        """Honour a grant that nobody uses, for those who may be counting on it; who comes first bears the cost."""
        resident = grant.resident
        try:
            lease = await self._honour(grant)
        except MetierError:
            return  # whoever waits for the same load is told
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
