"""The state of an engine's adapter slots: which adapters are resident, pinned or leaving, and which asks wait."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import anyio

from .adapter import LoadedAdapter, SwapCost
from .announced_uses import AnnouncedUses

__all__ = ["AdapterLease", "Resident", "SlotGrant", "SlotQueue", "SlotTable", "SlotWaiter"]


@dataclass
class AdapterLease:
    """A claim of an ask on an adapter; `swaps` and `cpu_s` are the loads and CPU-seconds charged to the ask.

    `swap_s` is the time it waited for loads and evictions; 0 for a prefetch that was ready.
    """

    adapter: LoadedAdapter
    swaps: int = 0
    swap_s: float = 0.0
    cpu_s: float = 0.0

    def charge(self, cost: SwapCost) -> None:
        """Charge the cost of a load or an eviction to this ask."""
        self.swap_s += cost.wall_s
        self.cpu_s += cost.cpu_s


@dataclass(eq=False)
class Resident:
    """An adapter in a slot, being loaded (`ready` not set) or being evicted (`leaving`).

    `unclaimed` is the cost of its load until an ask uses it; the first one to do so is charged.
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
        """Whether it may be evicted now."""
        return self.pins == 0 and not self.leaving and self.ready.is_set()


@dataclass(eq=False)
class SlotGrant:
    """A pin just given. The holder of one with `loads` must load the adapter, for all that pinned it."""

    resident: Resident
    loads: bool = False
    evicts: Resident | None = None


class SlotTable:
    """Decides which adapters an engine holds; the caller carries out each move and reports it back.

    An adapter in use is never evicted, and a new one is loaded only after the one it replaces was unloaded, so the
    engine never holds more than `slots`. Asks without a slot wait in a queue. Others may overtake the first of them,
    but only `pass_limit` times; after that new asks queue behind it, so that pins are given back and the first is
    served.

    Without `announced` the longest idle adapter is evicted, the queue is served in order, and only asks for a
    resident adapter overtake. With it, the uses that runs have announced decide:

    - the adapter whose next announced use is furthest is evicted, unannounced ones first (the longest idle of
      them): Belady's rule;
    - an adapter that some run uses within `pin_asks` asks stays, and asks that want its slot wait, unless no adapter
      is in use at all or the first in the queue has been overtaken `pass_limit` times;
    - a free slot goes to the adapter that most asks wait for, so that they run together;
    - an adapter announced within `prefetch_asks` asks is fetched ahead, when a slot is empty or holds an adapter that
      is not announced within `sure_asks` asks (further announcements are guesses). Evicting a nearer one would only
      move a load forward, and often cause a second one.

    Numbers are given here only, one per content id, and a number whose load failed is never given again
    (vLLM may keep a half-loaded adapter under it).

    `AdapterSlots` carries the moves out on an engine, the simulator on a clock of its own. A claim is granted at once
    or waits in the queue, where `SlotWaiter.turn` is set with its grant. A grant that `loads` is answered with
    `evicted` (when it `evicts`) and then `loaded`, or `failed`; each ends with `release`.
    """

    def __init__(
        self,
        slots: int,
        *,
        pass_limit: int = 32,
        announced: AnnouncedUses | None = None,
        pin_asks: int = 2,
        prefetch_asks: int = 1,
        sure_asks: int = 16,
    ) -> None:
        self._slots = slots
        self._pass_limit = pass_limit
        self._announced = announced
        self._pin_asks = pin_asks
        self._prefetch_asks = prefetch_asks
        self._sure_asks = sure_asks
        self._next_number = itertools.count(1)
        self._numbers: dict[str, int] = {}
        self._residents: dict[str, Resident] = {}
        self._refused: set[str] = set()
        self._waiting = SlotQueue[SlotGrant]()
        self._uses = itertools.count(1)

    @property
    def resident(self) -> tuple[str, ...]:
        """Content ids of the adapters that are in a slot now."""
        return tuple(id for id, r in self._residents.items() if r.ready.is_set())

    # --- claims -------------------------------------------------------------------------------------------

    def claim(self, id: str, path: Path) -> SlotGrant | SlotWaiter[SlotGrant]:
        """A pin on adapter `id` if it can be had now, else a place in the queue."""
        return self._grant_newcomer(id, path) or self._waiting.join(id, path)

    def withdraw(self, waiter: SlotWaiter[SlotGrant]) -> None:
        """Leave the queue without having been served."""
        self._waiting.leave(waiter)
        self.serve()

    def serve(self) -> None:
        """Grant whatever can be granted now."""
        while self._waiting and self._serve_one():
            pass

    def release(self, resident: Resident) -> None:
        """Give a pin back."""
        resident.pins -= 1
        resident.last_used = next(self._uses)
        self.serve()

    # --- moves --------------------------------------------------------------------------------------------

    def evicted(self, grant: SlotGrant) -> None:
        """The adapter that the grant replaces was unloaded."""
        assert grant.evicts is not None
        del self._residents[grant.evicts.adapter.id]

    def loaded(self, grant: SlotGrant) -> None:
        """The adapter is loaded."""
        self._refused.discard(grant.resident.adapter.id)
        grant.resident.ready.set()
        self.serve()

    def failed(self, grant: SlotGrant, error: BaseException) -> None:
        """The load, or the eviction before it, failed: all that pinned the adapter get the error."""
        resident, id = grant.resident, grant.resident.adapter.id
        resident.error = error
        self._refused.add(id)
        self._residents.pop(id, None)
        self._numbers.pop(id, None)
        evicts = grant.evicts
        if evicts is not None and self._residents.get(evicts.adapter.id) is evicts:
            # An adapter whose eviction failed counts as gone; if it is asked for again, it gets another number.
            del self._residents[evicts.adapter.id]
            self._numbers.pop(evicts.adapter.id, None)
        resident.ready.set()
        self.serve()

    # --- prefetch -----------------------------------------------------------------------------------------

    def next_prefetch(self) -> str | None:
        """The announced adapter to load now, None when there is none or no slot for it."""
        if self._announced is None or self._waiting or not self._has_spare_slot():
            return None
        soon = self._announced.within(self._prefetch_asks)
        return next((id for id in soon if id not in self._residents and id not in self._refused), None)

    def claim_ahead(self, id: str, path: Path) -> SlotGrant | None:
        """A pin for a prefetch; None when there is no room after all."""
        return self._try_grant(id, path, starved=False)

    def announcements_changed(self) -> None:
        """Grant what waited for slots that were kept for uses no longer announced."""
        if self._waiting:
            self.serve()

    def _has_spare_slot(self) -> bool:
        staying = [r for r in self._residents.values() if not r.leaving]
        return len(staying) < self._slots or any(r.evictable and self._distance(r) > self._sure_asks for r in staying)

    # --- the queue ----------------------------------------------------------------------------------------

    def _grant_newcomer(self, id: str, path: Path) -> SlotGrant | None:
        if not self._waiting:
            return self._try_grant(id, path, starved=False)
        first = self._waiting.first
        if id not in self._residents or first.overtaken >= self._pass_limit:
            return None
        grant = self._try_grant(id, path, starved=False)
        if grant is not None:
            first.overtaken += 1
        return grant

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

    def _by_preference(self, first: SlotWaiter[SlotGrant]) -> list[SlotWaiter[SlotGrant]]:
        """The longest waiting ask of each adapter, in the order in which they get a slot."""
        heads = self._waiting.heads()
        if self._announced is None:
            return [first, *(w for w in heads if w is not first and w.id in self._residents)]
        return sorted(heads, key=lambda w: (w.id not in self._residents, -self._waiting.count(w.id), w.number))

    # --- slots --------------------------------------------------------------------------------------------

    def _try_grant(self, id: str, path: Path, *, starved: bool) -> SlotGrant | None:
        """Pin `id` if it is resident or there is room for it, else None. Never waits."""
        resident = self._residents.get(id)
        if resident is not None:
            if resident.leaving:
                return None
            resident.pins += 1
            return SlotGrant(resident)
        evicts = None
        if sum(not r.leaving for r in self._residents.values()) >= self._slots:
            evicts = self._victim(starved)
            if evicts is None:
                return None
            evicts.leaving = True
        number = self._numbers.get(id) or next(self._next_number)
        self._numbers[id] = number
        resident = Resident(LoadedAdapter(number, id, path), pins=1)
        self._residents[id] = resident
        return SlotGrant(resident, loads=True, evicts=evicts)

    def _victim(self, starved: bool) -> Resident | None:
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

    def _distance(self, resident: Resident) -> float:
        """Asks until a resident adapter is used again, 0 when an ask waits for it already."""
        assert self._announced is not None
        id = resident.adapter.id
        return 0 if id in self._waiting else self._announced.distance(id)


Grant = TypeVar("Grant")


@dataclass(eq=False)
class SlotWaiter(Generic[Grant]):
    """An ask in the queue; `overtaken` counts the asks served before it while it was first."""

    id: str
    path: Path
    number: int
    overtaken: int = 0
    turn: anyio.Event = field(default_factory=anyio.Event)
    grant: Grant | None = None


class SlotQueue(Generic[Grant]):
    """Waiting asks; true when there are any, and contains the adapter ids they wait for."""

    def __init__(self) -> None:
        self._by_adapter: dict[str, deque[SlotWaiter[Grant]]] = {}
        self._numbers = itertools.count(1)

    def __bool__(self) -> bool:
        return bool(self._by_adapter)

    def __contains__(self, id: str) -> bool:
        return id in self._by_adapter

    @property
    def first(self) -> SlotWaiter[Grant]:
        """The ask that has waited longest."""
        return min(self.heads(), key=lambda waiter: waiter.number)

    def heads(self) -> list[SlotWaiter[Grant]]:
        """The ask that has waited longest for each adapter."""
        return [waiters[0] for waiters in self._by_adapter.values()]

    def count(self, id: str) -> int:
        """Number of asks that wait for an adapter."""
        return len(self._by_adapter[id])

    def join(self, id: str, path: Path) -> SlotWaiter[Grant]:
        """Queue up behind all others."""
        waiter = SlotWaiter[Grant](id, path, next(self._numbers))
        self._by_adapter.setdefault(id, deque()).append(waiter)
        return waiter

    def leave(self, waiter: SlotWaiter[Grant]) -> None:
        """Leave, served or not."""
        waiters = self._by_adapter[waiter.id]
        waiters.remove(waiter)
        if not waiters:
            del self._by_adapter[waiter.id]
