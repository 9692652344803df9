"""A listener that raises harms no run, no batch and no other listener, and is named once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import BaseModel

from metier.agents import Role, ScriptedBackend, TaskGraph
from metier.runtime import open_session
from metier.runtime.events import Event

pytestmark = pytest.mark.anyio


class Puzzle(BaseModel):
    text: str


graph = TaskGraph("solve", takes=Puzzle, gives=str)
graph.step(Role("solver", takes=Puzzle, gives=str))


class Watcher:
    """Raises at one kind of event, and keeps what it was told."""

    def __init__(self, raises_at: str) -> None:
        self.raises_at = raises_at
        self.kinds: list[str] = []

    def watch(self, event: Event) -> None:
        self.kinds.append(event.kind)
        if event.kind == self.raises_at:
            raise KeyError("no such column")


async def batch(watcher: Watcher, reply: Any = lambda ask: "4") -> list[Any]:
    backend = ScriptedBackend(default=reply)
    async with open_session(backend=backend, store=":memory:", on_event=watcher.watch) as session:
        others: list[str] = []
        session.listen(lambda event: others.append(event.kind))
        results = await session.map(graph, [Puzzle(text=str(n)) for n in range(5)], concurrency=2)
        assert others == watcher.kinds and watcher.kinds.count(watcher.raises_at) == 5
        assert all(run.state != "running" for run in session.store.runs(session.batch or ""))
        return results


@pytest.mark.parametrize("kind", ["run_started", "step_started", "ask_finished", "step_finished", "run_finished"])
async def test_every_run_ends_as_without_it(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        results = await batch(Watcher(kind))
    assert [result.output for result in results] == ["4"] * 5
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"the listener Watcher.watch raised at event '{kind}'" in said


async def test_a_run_that_failed_keeps_its_own_error(caplog: pytest.LogCaptureFixture) -> None:
    def fails(ask: Any) -> str:
        raise ZeroDivisionError("by the script")

    results = await batch(Watcher("run_failed"), fails)
    assert all("ZeroDivisionError: by the script" in str(result.error) for result in results)
    assert len(caplog.records) == 1
