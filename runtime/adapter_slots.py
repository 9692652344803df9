"""Who may be resident in an engine's adapter slots: numbers, pins, eviction, prefetch, and a fair queue."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import anyio

from ..agents.errors import MetierError
from .announced_uses import AnnouncedUses
from .engine import LoadedAdapter, SwapCost
from .slot_queue import SlotQueue, SlotWaiter

__all__ = ["AdapterLease", "AdapterMove", "AdapterSlots", "OnAdapterMove", "OnAdapterUse"]

AdapterMove = Callable[[LoadedAdapter], Awaitable[SwapCost]]
OnAdapterMove = Callable[[str, LoadedAdapter, SwapCost], None]
OnAdapterUse = Callable[[Literal["began", "ended"], str], None]


@dataclass
class AdapterLease:
    """The right to use an adapter; `swaps` and `cpu_s` are what getting it has cost this ask.

    `swap_s` is the part of its waiting that went into loading and evicting; a prefetch nobody waited for has none.
    """

    adapter: LoadedAdapter
    swaps: int = 0
    swap_s: float = 0.0
    cpu_s: float = 0.0

    def charge(self, cost: SwapCost) -> None:
        """Put the cost of a load or an eviction on this ask's account."""
        self.swap_s += cost.wall_s
        self.cpu_s += cost.cpu_s


@dataclass(eq=False)
class _Resident:
    """An adapter in a slot, on its way in (`ready` not set) or on its way out (`leaving`).

    `unclaimed` is what bringing it in has cost while no ask has used it: the first one to do so bears it.
    """

    adapter: LoadedAdapter
    pins: int = 0
    last_used: int = 0
    leaving: bool = False
    ready: anyio.Event = field(default_factory=anyio.Event)
    error: BaseException | None = None
    unclaimed: AdapterLease | None = None

    @property
    def evictable(self) -> bool:
        return self.pins == 0 and not self.leaving and self.ready.is_set()


@dataclass(eq=False)
class _Grant:
    """A pin just given. Whoever holds it with `loads` must bring the adapter in, for all who pinned it."""

    resident: _Resident
    loads: bool = False
    evicts: _Resident | None = None


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
        self._slots = slots
        self._load = load
        self._unload = unload
        self._pass_limit = pass_limit
        self._announced = announced
        self._pin_asks = pin_asks
        self._prefetch_asks = prefetch_asks
        self._sure_asks = sure_asks
        self._on_move = on_move or (lambda kind, adapter, cost: None)
        self._on_use = on_use or (lambda kind, id: None)
        self._next_number = itertools.count(1)
        self._numbers: dict[str, int] = {}
        self._residents: dict[str, _Resident] = {}
        self._refused: set[str] = set()
        self._waiting = SlotQueue[_Grant]()
        self._uses = itertools.count(1)
        self.prefetches = 0
        self.unclaimed_cpu_s = 0.0
        """CPU seconds of loads and evictions that no ask bears: failed ones, and prefetches not used so far."""

    @property
    def resident(self) -> tuple[str, ...]:
        """Content ids of the adapters that are in a slot now."""
        return tuple(id for id, r in self._residents.items() if r.ready.is_set())

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
            self._unpin(grant.resident)

    # --- prefetch -----------------------------------------------------------------------------------------

    def next_prefetch(self) -> str | None:
        """The announced adapter that `prefetch` would bring in now, None when there is none or no slot for it."""
        if self._announced is None or self._waiting or not self._has_spare_slot():
            return None
        soon = self._announced.within(self._prefetch_asks)
        return next((id for id in soon if id not in self._residents and id not in self._refused), None)

    async def prefetch(self, paths: Mapping[str, Path]) -> None:
        """Bring in announced adapters while there are slots to spare; `paths` are the folders of those known.

        A load that fails is no error here: the ask that needs the adapter tries again and is told. The cost goes
        to the first ask that uses the adapter, and stays in `unclaimed_cpu_s` when none does.
        """
        while (id := self.next_prefetch()) is not None and id in paths:
            grant = self._try_grant(id, paths[id], starved=False)
            if grant is None:
                return
            self.prefetches += 1
            await self._leave_unclaimed(grant)

    def announcements_changed(self) -> None:
        """Someone may be waiting for a slot that was kept for an announced use which is off now."""
        if self._waiting:
            self._serve_queue()

    def _has_spare_slot(self) -> bool:
        staying = [r for r in self._residents.values() if not r.leaving]
        return len(staying) < self._slots or any(r.evictable and self._distance(r) > self._sure_asks for r in staying)

    # --- the queue ----------------------------------------------------------------------------------------

    async def _wait_grant(self, id: str, path: Path) -> _Grant:
        grant = self._grant_newcomer(id, path)
        if grant is not None:
            return grant
        waiter = self._waiting.join(id, path)
        try:
            await waiter.turn.wait()
        except BaseException:
            if waiter.grant is None:
                self._waiting.leave(waiter)
                self._serve_queue()
            else:
                # Cancelled between the grant and its use; others may be counting on the load by now.
                with anyio.CancelScope(shield=True):
                    await self._leave_unclaimed(waiter.grant)
            raise
        assert waiter.grant is not None
        return waiter.grant

    def _grant_newcomer(self, id: str, path: Path) -> _Grant | None:
        if not self._waiting:
            return self._try_grant(id, path, starved=False)
        first = self._waiting.first
        if id not in self._residents or first.overtaken >= self._pass_limit:
            return None
        grant = self._try_grant(id, path, starved=False)
        if grant is not None:
            first.overtaken += 1
        return grant

    def _serve_queue(self) -> None:
        """Grant whatever can be granted now."""
        while self._waiting and self._serve_one():
            pass

    def _serve_one(self) -> bool:
        first = self._waiting.first
        starved = first.overtaken >= self._pass_limit
        for waiter in (first,) if starved else self._by_preference(first):
            waiter.grant = self._try_grant(waiter.id, waiter.path, starved=starved)
            if waiter.grant is not None:
                first.overtaken += waiter is not first
                self._waiting.leave(waiter)
                waiter.turn.set()
                return True
        return False

    def _by_preference(self, first: SlotWaiter[_Grant]) -> list[SlotWaiter[_Grant]]:
        """The longest waiting ask of each adapter, in the order in which they should get a slot."""
        heads = self._waiting.heads()
        if self._announced is None:
            return [first, *(w for w in heads if w is not first and w.id in self._residents)]
        return sorted(heads, key=lambda w: (w.id not in self._residents, -self._waiting.count(w.id), w.number))

    # --- slots --------------------------------------------------------------------------------------------

    def _try_grant(self, id: str, path: Path, *, starved: bool) -> _Grant | None:
        """Pin `id` if it is resident or there is room for it, else None. Never waits."""
        resident = self._residents.get(id)
        if resident is not None:
            if resident.leaving:
                return None
            resident.pins += 1
            return _Grant(resident)
        evicts = None
        if sum(not r.leaving for r in self._residents.values()) >= self._slots:
            evicts = self._victim(starved)
            if evicts is None:
                return None
            evicts.leaving = True
        number = self._numbers.get(id) or next(self._next_number)
        self._numbers[id] = number
        resident = _Resident(LoadedAdapter(number, id, path), pins=1)
        self._residents[id] = resident
        return _Grant(resident, loads=True, evicts=evicts)

    def _victim(self, starved: bool) -> _Resident | None:
        """The idle adapter to evict, None when all are in use or worth waiting for."""
        idle = [r for r in self._residents.values() if r.evictable]
        if not idle:
            return None
        if self._announced is None:
            return min(idle, key=lambda r: r.last_used)
        distance, _, victim = max(((self._distance(r), -r.last_used, r) for r in idle), key=lambda found: found[:2])
        # Waiting makes sense only while something is in use: its end is what wakes the queue again.
        if distance > self._pin_asks or starved or not any(r.pins for r in self._residents.values()):
            return victim
        return None

    def _distance(self, resident: _Resident) -> float:
        """Asks until a resident adapter is used again, 0 when someone waits for it already."""
        assert self._announced is not None
        id = resident.adapter.id
        return 0 if id in self._waiting else self._announced.distance(id)

    async def _honour(self, grant: _Grant) -> AdapterLease:
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

    async def _leave_unclaimed(self, grant: _Grant) -> None:
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
            self._unpin(resident)

    async def _bring_in(self, grant: _Grant, lease: AdapterLease) -> None:
        resident, id = grant.resident, grant.resident.adapter.id
        try:
            if grant.evicts is not None:
                leaving = grant.evicts.adapter
                cost = await self._unload(leaving)
                del self._residents[leaving.id]
                lease.charge(cost)
                self._on_move("adapter_evicted", leaving, cost)
            cost = await self._load(resident.adapter)
            lease.swaps += 1
            lease.charge(cost)
            self._refused.discard(id)
            self._on_move("adapter_loaded", resident.adapter, cost)
        except BaseException as error:
            resident.error = error
            self.unclaimed_cpu_s += lease.cpu_s
            self._refused.add(id)
            self._residents.pop(id, None)
            self._numbers.pop(id, None)
            evicts = grant.evicts
            if evicts is not None and self._residents.get(evicts.adapter.id) is evicts:
                # Half gone is gone: if it is asked for again, it comes back under another number.
                del self._residents[evicts.adapter.id]
                self._numbers.pop(evicts.adapter.id, None)
        finally:
            resident.ready.set()
            self._serve_queue()

    def _unpin(self, resident: _Resident) -> None:
        resident.pins -= 1
        resident.last_used = next(self._uses)
        self._serve_queue()
