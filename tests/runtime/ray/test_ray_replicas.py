"""Engines as replicas on a Ray of our own: answers, adapters, streams, cores, and ten kill -9."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from metier.agents import Ask, Role, TaskGraph
from metier.agents.errors import EngineError
from metier.router import Assignment, Candidate
from metier.runtime import open_session
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.ray.backend import RayBackend
from metier.runtime.settings.ray import RaySettings
from metier.runtime.settings.session import load_settings
from metier.runtime.trials.probe_options import ProbeOptions
from metier.runtime.trials.run_probe import open_trials
from metier.specializers.shelf.variant import Variant
from tests.agents.workflow import Puzzle
from tests.runtime.conftest import TINY
from tests.runtime.trials.test_probe_engine import WORKFLOW

pytestmark = [pytest.mark.ray, pytest.mark.anyio]

KILLS = 10
text_graph = TaskGraph("texts", takes=Puzzle, gives=str)
_first = text_graph.step(Role("planner", takes=Puzzle, gives=str, max_tokens=24))
text_graph.returns(text_graph.step(Role("solver", takes={"draft": str}, gives=str, max_tokens=24), after=_first))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_replicas_answer_as_an_engine_here_does_and_leave_nothing_behind(
    tiny_base: Path,
    tiny_variants: dict[str, tuple[Variant, Path]],
    tiny_engine: InProcessEngine,
    make_ask: Callable[..., Ask],
) -> None:
    kinds: list[str] = []
    used: list[str] = []
    async with RayBackend(
        tiny_base,
        tiny_variants.__getitem__,
        RaySettings(),
        TINY,
        on_event=lambda event: kinds.append(event.kind),
        on_abandoned=lambda ask, usage: used.append(ask.role),
    ) as backend:
        await backend.warm()
        held = backend.replicas()
        assert sorted(held) == ["base/0", "base/1"]

        asks = [make_ask(f"Add {n} and 7.", step=f"{n}") for n in range(12)]
        replies: dict[str, tuple[str, str]] = {}

        async def ask(one: Ask) -> None:
            reply = await backend.reply(one)
            assert reply.usage.cpu_s > 0 and reply.placement.startswith(reply.engine)
            replies[one.step_path] = (reply.text, reply.engine)

        async with anyio.create_task_group() as tasks:
            for one in asks:
                tasks.start_soon(ask, one)
        assert {engine for _, engine in replies.values()} == set(held)
        alone = [(await backend.reply(one)).text for one in asks]
        assert alone == [(await tiny_engine.generate(EngineRequest(one))).text for one in asks]

        # Five adapters over two slots at each replica.
        for name in ["lora0", "lora1", "lora2", "lora3", "lora4", "lora0"]:
            reply = await backend.reply(make_ask(variant=name))
            assert reply.variant == tiny_variants[name][0].id
        totals = backend.totals()
        assert sum(row["adapter_loads"] for row in totals.values()) >= 5
        assert "adapter_loaded" in kinds

        pieces: list[str] = []
        streamed = await backend.reply(asks[0], on_text=pieces.append)
        assert "".join(pieces) == streamed.text and len(pieces) > 1

        # One that nobody waits for any more: what it has used is told with a later reply.
        with anyio.CancelScope() as scope:
            await backend.reply(make_ask(role="critic", max_tokens=400), on_text=lambda piece: scope.cancel())
        with anyio.fail_after(60):
            while "critic" not in used:  # both replicas are asked, whichever had it
                async with anyio.create_task_group() as tasks:
                    for one in asks:
                        tasks.start_soon(ask, one)

        cores = [{frozenset(os.sched_getaffinity(pid)) for pid in pids[1:]} for pids in held.values()]
        if len(os.sched_getaffinity(0)) >= 2:
            assert all(len(of_one) == 1 for of_one in cores) and cores[0].isdisjoint(cores[1])
    assert not [pid for pids in held.values() for pid in pids if os.path.exists(f"/proc/{pid}")]  # noqa: ASYNC240


async def test_ten_replicas_killed_in_the_middle_lose_no_run_and_record_no_step_twice(tiny_base: Path) -> None:
    chance = random.Random(7)
    engine = {f"engine.{name}": value for name, value in TINY.model_dump(exclude_defaults=True).items()}
    settings = load_settings(overrides=engine | {"concurrency": 6, "ray.tries": 30, "ray.health_every_s": 0.5})
    async with open_session(
        base=tiny_base, assignment=Assignment(), engine="ray", store=":memory:", settings=settings
    ) as session:
        backend = session._backend
        assert isinstance(backend, RayBackend)
        over = anyio.Event()

        async def kill() -> None:
            killed: set[tuple[int, ...]] = set()
            while len(killed) < KILLS:
                # Not only one at a time: while one is starting, the other may go too.
                while not (alive := sorted(set(backend.replicas().values()) - killed)):  # noqa: ASYNC110
                    await anyio.sleep(0.02)
                pids = chance.choice(alive)
                os.kill(chance.choice(pids), signal.SIGKILL)
                killed.add(pids)
            while len(set(backend.replicas().values()) - killed) < 2:  # noqa: ASYNC110 - Ray has nothing to await
                await anyio.sleep(0.02)
            over.set()

        runs = 0
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            while not over.is_set():
                results = await session.map(text_graph, [Puzzle(text=f"{runs + n} cows") for n in range(24)])
                assert [result.error for result in results] == [None] * 24
                runs += 24
        rows = session.store.query("SELECT count(*) AS n FROM asks WHERE error IS NULL GROUP BY run, path")
        totals = session.engine_totals()
    assert [row["n"] for row in rows] == [1] * runs * 2
    assert sum(row["restarts"] for row in totals.values()) == KILLS


async def test_an_engine_that_cannot_start_is_said_with_the_reason(tiny_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    os.truncate(broken / "model.safetensors", 100)
    async with RayBackend(broken, {}.__getitem__, RaySettings(replicas=1), TINY, adapters=False) as backend:
        with pytest.raises(EngineError, match="do not start"):
            await backend.warm()


async def test_a_probe_measures_on_replicas(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "guess.py").write_text(WORKFLOW)
    options = ProbeOptions(
        workflow=str(tmp_path / "guess.py"),
        tasks="tune:4",
        variants=("base",),
        base=str(tiny_base),
        engine="ray",
        overrides={"shelf": str(tmp_path / "shelf"), "engine": TINY.model_dump(mode="json"), "ray.replicas": 1},
    )
    async with open_trials(options, tmp_path / "probe") as trials:
        tasks = trials.file.tasks(options.tasks)
        everywhere = trials.space.uniform(Candidate("base"))
        outcomes = await trials.evaluator(tasks).outcomes(everywhere, [task.id for task in tasks])
        assert all(ask.cpu_s > 0 for outcome in outcomes for ask in outcome.asks)
        assert not any(footprint.memory_known for footprint in trials.footprints.values())
        assert isinstance(trials.backend._backend, RayBackend)
