"""Supervised engines that hang: a stopped process answers nothing and does not end."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import Ask, Reply, Role, TaskGraph
from metier.agents.backend import OnText
from metier.agents.errors import EngineDeadError
from metier.runtime import RunStore, open_session
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.pool import EnginePool
from metier.runtime.engines.supervised.core_pulse import CorePulse
from metier.runtime.engines.supervised.hang_watch import HangWatch
from metier.runtime.engines.supervised.supervised_engine import SupervisedEngine
from metier.runtime.settings.engine import EngineSettings
from tests.runtime.conftest import TINY
from tests.runtime.engines.test_supervised_engine import Engines

MakeAsk = Callable[..., Ask]
ON_ASYNCIO = pytest.mark.parametrize("anyio_backend", ["asyncio"])

# Short enough for a test, long enough for a machine that is busy with other tests.
IMPATIENT = TINY.model_copy(update={"hang_timeout_s": 10.0, "restart_limit": 20})
QUICK = EngineSettings(hang_timeout_s=0.5, step_timeout_s=0.3)


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    ready: bool


graph = TaskGraph("hangs", takes=Puzzle, gives=Plan)
solver = Role("solver", takes=Puzzle, gives=Plan, max_tokens=64)
critic = Role("critic", takes=Plan, gives=Plan, max_tokens=64)
graph.returns(graph.step(critic, after=graph.step(solver)))

TASKS = 8
VICTIMS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "host": lambda pids: pids[:1],
    "core": lambda pids: pids[-1:],
    "both": lambda pids: pids,
}


class Stopper:
    """A pool that stops processes of its engine when so many pieces of text have come, once for each `arm`."""

    def __init__(self, pool: EnginePool, engines: Engines) -> None:
        self._pool = pool
        self._engines = engines
        self._left = 0
        self._victim = "host"

    def arm(self, victim: str, pieces: int) -> None:
        """Stop the victim at the given piece from now."""
        self._victim, self._left = victim, pieces

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        return await self._pool.reply(ask, on_text=self._count)

    def _count(self, piece: str) -> None:
        self._left -= 1
        if self._left == 0:
            for pid in VICTIMS[self._victim](self._engines.started[-1].pids):
                os.kill(pid, signal.SIGSTOP)


async def hang_again_and_again(base: Path, store: Path, victims: list[str], draw: random.Random) -> list[float]:
    """Map the graph once for each victim, which is stopped in the middle; the seconds that each map took."""
    engines, seconds = Engines(), list[float]()
    async with EnginePool(base, {}.__getitem__, IMPATIENT, adapters=False, start_engine=engines) as pool:
        stopper = Stopper(pool, engines)
        async with open_session(backend=stopper, store=store) as session:
            for number, victim in enumerate(victims):
                await pool.warm()
                stopper.arm(victim, draw.randrange(2, 60))
                began_s = time.monotonic()
                results = await session.map(graph, [Puzzle(text=f"{number} {n}") for n in range(TASKS)], concurrency=6)
                seconds.append(time.monotonic() - began_s)
                assert [result.error for result in results] == [None] * TASKS
                assert len(engines.started) == number + 2
    assert engines.left_behind() == []
    assert engines.shared_memory_left() == []
    with RunStore(store) as runs:
        states = runs.query("SELECT state, count(*) AS n FROM runs GROUP BY state")
        answered = runs.query("SELECT count(*) AS n FROM asks WHERE error IS NULL GROUP BY run, path")
    assert [(row["state"], row["n"]) for row in states] == [("finished", TASKS * len(victims))]
    assert [row["n"] for row in answered] == [1] * (2 * TASKS * len(victims))
    return seconds


@pytest.mark.engine
@pytest.mark.anyio
@ON_ASYNCIO
async def test_an_engine_whose_host_or_core_is_stopped_is_started_again_and_loses_nothing(
    tiny_base: Path, tmp_path: Path
) -> None:
    await hang_again_and_again(tiny_base, tmp_path / "runs.db", ["core", "host"], random.Random(3))


@pytest.mark.faults
@pytest.mark.anyio
@ON_ASYNCIO
@pytest.mark.parametrize("victim", VICTIMS)
async def test_campaign_of_hangs_loses_nothing(
    tiny_base: Path, tmp_path: Path, victim: str, record_property: Callable[[str, Any], None]
) -> None:
    """Ten hangs of each kind at random moments under load."""
    seconds = await hang_again_and_again(tiny_base, tmp_path / "runs.db", [victim] * 10, random.Random(victim))
    record_property("map_s", [round(s, 1) for s in seconds])
    print(f"{victim}: a map with a hang and a restart took {min(seconds):.1f} to {max(seconds):.1f} s")


@pytest.mark.faults
@pytest.mark.anyio
@ON_ASYNCIO
async def test_an_engine_that_hangs_while_nobody_asks_is_dead_before_the_next_ask(
    tiny_base: Path, make_ask: MakeAsk
) -> None:
    async with await SupervisedEngine.start(tiny_base, IMPATIENT, adapters=False) as engine:
        os.kill(engine.pids[-1], signal.SIGSTOP)
        with anyio.fail_after(60), pytest.raises(EngineDeadError, match="no sign of life"):
            await engine.generate(EngineRequest(make_ask()))
        assert engine.dead


# --- the two halves of the heartbeat, without an engine --------------------------------------------------------


def test_silence_is_noticed_once_and_not_while_something_is_heard() -> None:
    hung, heard = threading.Event(), threading.Semaphore(0)
    watch = HangWatch("test", QUICK, hung.set)
    silence: Any = watch._heard

    class Counted:
        """The event of the watch, which says when it was looked at."""

        def is_set(self) -> bool:
            heard.release()
            return bool(silence.is_set())

        def clear(self) -> None:
            silence.clear()

        def set(self) -> None:
            silence.set()

    watch._heard = Counted()  # type: ignore[assignment]
    watch.start()
    for _ in range(12):  # longer than it would take to be given up
        watch.heard()
        assert heard.acquire(timeout=10)
    assert not hung.is_set()
    assert hung.wait(timeout=10)


def test_a_watch_that_was_stopped_says_nothing() -> None:
    hung = threading.Event()
    watch = HangWatch("test", QUICK, hung.set)
    watch.start()
    watch.stop()
    watch._thread.join(timeout=10)
    assert not watch._thread.is_alive() and not hung.is_set()


@pytest.mark.anyio
@ON_ASYNCIO
async def test_a_core_that_answers_beats() -> None:
    beats = anyio.Semaphore(0)

    async def answer() -> None:
        await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(CorePulse(answer, (), QUICK, beats.release).run)
        with anyio.fail_after(10):
            for _ in range(3):
                await beats.acquire()
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
@ON_ASYNCIO
@pytest.mark.parametrize(("busy", "beats"), [(True, 5), (False, 0)])
async def test_a_core_that_does_not_answer_beats_while_it_computes_until_its_step_takes_too_long(
    busy: bool, beats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five waits of 0.05 s are within a step of 0.3 s."""
    laps, enough, heard = itertools.count(), anyio.Event(), list[None]()

    def lap() -> float:
        if next(laps) == 20:
            enough.set()
        return 0.01 * busy

    pulse = CorePulse(anyio.sleep_forever, (), QUICK, lambda: heard.append(None))
    monkeypatch.setattr(pulse._clock, "lap", lap)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pulse.run)
        with anyio.fail_after(10):
            await enough.wait()
        tasks.cancel_scope.cancel()
    assert len(heard) == beats
