"""Replicas that hang, as the driver sees them; the calls are made by hand, so that no Ray is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from metier.agents.errors import EngineDeadError
from metier.agents.messages import Ask
from metier.runtime.engines.engine import EngineCounters, EngineRequest
from metier.runtime.engines.supervised.host_protocol import Ready
from metier.runtime.ray.replica_engine import ReplicaEngine

pytestmark = pytest.mark.anyio


class Hung:
    """A handle of Serve's whose calls never come back; the answer to a call is the handle itself."""

    def __init__(self) -> None:
        self.called = anyio.Event()
        self.cancelled = 0
        self.take = self.stream = self

    def options(self, **how: Any) -> Hung:
        return self

    def remote(self, *what: Any, **on: Any) -> Hung:
        self.called.set()
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    def __await__(self) -> Any:
        return anyio.sleep_forever().__await__()

    def __aiter__(self) -> Hung:
        return self

    async def __anext__(self) -> bytes:
        await anyio.sleep_forever()
        raise AssertionError


@pytest.mark.parametrize("streamed", [False, True])
async def test_asks_at_a_replica_that_serve_gave_up_end_and_are_cancelled_there(
    make_ask: Callable[..., Ask], streamed: bool
) -> None:
    handle = Hung()
    engine = ReplicaEngine(handle, "replica#1", Ready(pids=(), counters=EngineCounters("base/0")))
    errors: list[EngineDeadError] = []

    async def ask() -> None:
        try:
            await engine.generate(EngineRequest(make_ask()), (lambda piece: None) if streamed else None)
        except EngineDeadError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await handle.called.wait()
        await anyio.wait_all_tasks_blocked()
        engine.lose()
    assert "replica#1 was given up" in errors[0].problem
    assert handle.cancelled >= 1
