"""Who may be resident in an engine's adapter slots: numbers, pins, eviction, and a fair queue for the rest."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from ..agents.errors import MetierError
from .engine import LoadedAdapter, SwapCost

__all__ = ["AdapterLease", "AdapterMove", "AdapterSlots", "OnAdapterMove"]

AdapterMove = Callable[[LoadedAdapter], Awaitable[SwapCost]]
OnAdapterMove = Callable[[str, LoadedAdapter, SwapCost], None]


@dataclass
class AdapterLease:
    """The right to use an adapter; `swaps`, `swap_s` and `cpu_s` are what getting it has cost this ask."""

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
    """An adapter in a slot, on its way in (`ready` not set) or on its way out (`leaving`)."""

    adapter: LoadedAdapter
    pins: int = 0
    last_used: int = 0
    leaving: bool = False
    ready: anyio.Event = field(default_factory=anyio.Event)
    error: BaseException | None = None

    @property
    def evictable(self) -> bool:
        return self.pins == 0 and not self.leaving and self.ready.is_set()


@dataclass(eq=False)
class _Grant:
    """A pin just given. Whoever holds it with `loads` must bring the adapter in, for all who pinned it."""

    resident: _Resident
    loads: bool = False
    evicts: _Resident | None = None


@dataclass(eq=False)
class _Waiter:
    id: str
    path: Path
    overtaken: int = 0
    turn: anyio.Event = field(default_factory=anyio.Event)
    grant: _Grant | None = None


class AdapterSlots:
    """The adapters of one engine: at most `slots` resident, those in use pinned, the longest idle evicted.

    `load` and `unload` reach the engine; an adapter in use is never unloaded and a new one comes in only after
    the one it replaces has left, so the engine never holds more than `slots`. Asks whose adapter finds no room
    wait in the order they came. Meanwhile an ask for a resident adapter may overtake the first of them, but
    only `pass_limit` times; after that newcomers queue behind, pins run out, and the first is served.

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
        on_move: OnAdapterMove | None = None,
    ) -> None:
        self._slots = slots
        self._load = load
        self._unload = unload
        self._pass_limit = pass_limit
        self._on_move = on_move or (lambda kind, adapter, cost: None)
        self._next_number = itertools.count(1)
        self._numbers: dict[str, int] = {}
        self._residents: dict[str, _Resident] = {}
        self._waiting: deque[_Waiter] = deque()
        self._uses = itertools.count(1)

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
            yield lease
        finally:
            self._unpin(grant.resident)

    async def _wait_grant(self, id: str, path: Path) -> _Grant:
        grant = self._grant_newcomer(id, path)
        if grant is not None:
            return grant
        waiter = _Waiter(id, path)
        self._waiting.append(waiter)
        try:
            await waiter.turn.wait()
        except BaseException:
            if waiter.grant is None:
                self._waiting.remove(waiter)
                self._serve_queue()
            else:
                # Cancelled between the grant and its use; others may be counting on the load by now.
                with anyio.CancelScope(shield=True):
                    try:
                        await self._honour(waiter.grant)
                    except MetierError:
                        pass  # those who wait for the same load are told
                    finally:
                        self._unpin(waiter.grant.resident)
            raise
        assert waiter.grant is not None
        return waiter.grant

    def _grant_newcomer(self, id: str, path: Path) -> _Grant | None:
        if not self._waiting:
            return self._try_grant(id, path)
        first = self._waiting[0]
        if id not in self._residents or first.overtaken >= self._pass_limit:
            return None
        grant = self._try_grant(id, path)
        if grant is not None:
            first.overtaken += 1
        return grant

    def _try_grant(self, id: str, path: Path) -> _Grant | None:
        """Pin `id` if it is resident or there is room for it, else None. Never waits."""
        resident = self._residents.get(id)
        if resident is not None:
            if resident.leaving:
                return None
            resident.pins += 1
            return _Grant(resident)
        evicts = None
        if sum(not r.leaving for r in self._residents.values()) >= self._slots:
            idle = [r for r in self._residents.values() if r.evictable]
            if not idle:
                return None
            evicts = min(idle, key=lambda r: r.last_used)
            evicts.leaving = True
        number = self._numbers.get(id) or next(self._next_number)
        self._numbers[id] = number
        resident = _Resident(LoadedAdapter(number, id, path), pins=1)
        self._residents[id] = resident
        return _Grant(resident, loads=True, evicts=evicts)

    def _serve_queue(self) -> None:
        """Grant whatever can be granted now: the first in order, then those who may overtake it."""
        while self._waiting:
            first = self._waiting[0]
            first.grant = self._try_grant(first.id, first.path)
            if first.grant is None:
                break
            self._waiting.popleft()
            first.turn.set()
        for waiter in list(self._waiting)[1:]:
            first = self._waiting[0]
            if first.overtaken >= self._pass_limit:
                return
            if waiter.id in self._residents:
                waiter.grant = self._try_grant(waiter.id, waiter.path)
                if waiter.grant is not None:
                    first.overtaken += 1
                    self._waiting.remove(waiter)
                    waiter.turn.set()

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
        return lease

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
            self._on_move("adapter_loaded", resident.adapter, cost)
        except BaseException as error:
            resident.error = error
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
