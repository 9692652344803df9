"""When engines start: at the first run that asks a role, or when told to; and who is told what is waited for."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel
from rich.console import Console

from metier.agents import EngineDeadError, Role, TaskGraph, UnknownVariantError
from metier.runtime import console, load_settings, open_session
from metier.runtime.engines import pool
from metier.runtime.engines.variant_targets import EngineStart
from metier.runtime.events import Event
from tests.runtime.conftest import TINY
from tests.runtime.engines.test_pool import FakeEngine, Started

pytestmark = pytest.mark.anyio


class Puzzle(BaseModel):
    text: str


def shout(puzzle: Puzzle) -> str:
    return puzzle.text.upper()


asking = TaskGraph("asking", takes=Puzzle, gives=str)
asking.step(Role("solver", takes=Puzzle, gives=str))
functions = TaskGraph("functions", takes=Puzzle, gives=str)
functions.step(shout)

SETTINGS = load_settings(overrides={"engine": TINY.model_dump(mode="json"), "shelf": "nowhere"})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The engines that are started, in place of real ones."""
    engines = Started()
    monkeypatch.setattr(pool, "_start_in_process", engines)
    return engines


async def test_engines_start_once_at_the_first_run_that_asks(tiny_base: Path, started: Started) -> None:
    heard: list[Event] = []
    async with open_session(base=tiny_base, store=":memory:", settings=SETTINGS, on_event=heard.append) as session:
        assert await session.run(functions, Puzzle(text="x")) == "X"
        assert started.engines == []
        heard.clear()
        async with anyio.create_task_group() as both:
            both.start_soon(session.run, asking, Puzzle(text="x"))
            both.start_soon(session.run, asking, Puzzle(text="y"))
        assert len(started.engines) == 1
        kinds = [event.kind for event in heard if event.kind != "preparing"]
        # Before the clock of any run begins.
        assert kinds[:3] == ["engine_starting", "engine_ready", "run_started"]


async def test_they_start_when_told_to(tiny_base: Path, started: Started) -> None:
    async with open_session(base=tiny_base, store=":memory:", settings=SETTINGS) as session:
        await session.start_engines()
        await session.start_engines()
        assert len(started.engines) == 1
        assert await session.run(asking, Puzzle(text="x")) == "base:-"
        assert len(started.engines) == 1


def test_a_session_of_plain_code_starts_them_too(tiny_base: Path, started: Started) -> None:
    with open_session(base=tiny_base, store=":memory:", settings=SETTINGS) as session:
        session.start_engines()
        assert len(started.engines) == 1 and session.run(asking, Puzzle(text="x")) == "base:-"


async def test_what_cannot_be_served_is_said_when_the_session_opens(tiny_base: Path, started: Started) -> None:
    with pytest.raises(UnknownVariantError, match="nobody"):
        async with open_session(base=tiny_base, store=":memory:", settings=SETTINGS, variants=["nobody"]):
            pytest.fail("the session opened")
    assert started.engines == []


async def test_an_engine_that_does_not_start_fails_the_run_and_is_tried_again(
    tiny_base: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [EngineDeadError("out of memory")]

    async def start(engine: EngineStart) -> FakeEngine:
        if broken:
            raise broken.pop()
        return await started(engine)

    monkeypatch.setattr(pool, "_start_in_process", start)
    async with open_session(base=tiny_base, store=":memory:", settings=SETTINGS) as session:
        with pytest.raises(EngineDeadError, match="out of memory"):
            await session.run(asking, Puzzle(text="x"))
        assert session.batch is not None
        (run,) = session.store.runs(session.batch)
        assert await session.resume(asking, run.id) == "base:-"


@pytest.mark.parametrize(("terminal", "listens"), [(True, False), (True, True), (False, False)])
async def test_what_is_waited_for_is_said_on_a_terminal_where_nobody_listens(
    tiny_base: Path, started: Started, monkeypatch: pytest.MonkeyPatch, terminal: bool, listens: bool
) -> None:
    written = StringIO()
    monkeypatch.setattr(console, "ERR", Console(file=written, force_terminal=terminal, width=200))
    on_event = (lambda event: None) if listens else None
    async with open_session(base=tiny_base, store=":memory:", settings=SETTINGS, on_event=on_event) as session:
        await session.start_engines()
    assert ("engine base starting" in written.getvalue()) is (terminal and not listens)
