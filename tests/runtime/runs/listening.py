"""A scripted backend that keeps what it is told about who runs next."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio

from metier.agents import Ask, Reply, ScriptedBackend
from metier.agents.backend import Prefetch, Upcoming


class Listening(ScriptedBackend):
    """Keeps what it is told about the future, and how far away each ask was said to be by the step before it."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.announced: dict[str, Upcoming] = {}
        self.before: dict[str, Upcoming] = {}
        self.distances: list[int | None] = []
        self.forgotten: list[str] = []
        self.fetched: list[str] = []

    def foresee(self, run_id: str, upcoming: Upcoming) -> Prefetch | None:
        self.before[run_id] = self.announced.get(run_id, ())
        self.announced[run_id] = upcoming
        return partial(self.fetch, run_id) if upcoming and upcoming[0][0] == "fetching" else None

    def forget(self, run_id: str) -> None:
        self.announced.pop(run_id, None)
        self.forgotten.append(run_id)

    async def fetch(self, run_id: str) -> None:
        self.fetched.append(run_id)
        await anyio.sleep_forever()

    async def reply(self, ask: Ask, **more: Any) -> Reply:
        assert dict(self.announced[ask.run_id])[ask.variant] == 0
        self.distances.append(dict(self.before[ask.run_id]).get(ask.variant))
        return await super().reply(ask, **more)
