"""The asks that wait for an adapter slot: in the order they came, and grouped by adapter."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import anyio

__all__ = ["SlotQueue", "SlotWaiter"]

Grant = TypeVar("Grant")


@dataclass(eq=False)
class SlotWaiter(Generic[Grant]):
    """An ask in the queue; `overtaken` counts who was served before it while it was the first."""

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
        """Who has waited longest."""
        return min(self.heads(), key=lambda waiter: waiter.number)

    def heads(self) -> list[SlotWaiter[Grant]]:
        """Who has waited longest for each adapter."""
        return [waiters[0] for waiters in self._by_adapter.values()]

    def count(self, id: str) -> int:
        """How many wait for an adapter."""
        return len(self._by_adapter[id])

    def join(self, id: str, path: Path) -> SlotWaiter[Grant]:
        """Queue up behind all others."""
        waiter = SlotWaiter[Grant](id, path, next(self._numbers))
        self._by_adapter.setdefault(id, deque()).append(waiter)
        return waiter

    def leave(self, waiter: SlotWaiter[Grant]) -> None:
        """Go, served or not."""
        waiters = self._by_adapter[waiter.id]
        waiters.remove(waiter)
        if not waiters:
            del self._by_adapter[waiter.id]
