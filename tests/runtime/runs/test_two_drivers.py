"""Several drivers on one run store: different runs go on side by side, one run has one driver at a time."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

from metier.agents import Ask, ScriptedBackend
from metier.agents.errors import ResumeError, RunTakenError
from metier.runtime import RunStore, open_session
from tests import workflow_for_cli
from tests.agents.workflow import Answer, Plan, Puzzle
from tests.runtime.served import graph

WORKFLOW = workflow_for_cli.__file__
COMMAND = [sys.executable, "-c", "from metier.runtime.cli.main import main; main()"]


@pytest.mark.anyio
async def test_a_run_that_another_driver_is_at_is_said_and_its_store_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    asked, go = anyio.Event(), anyio.Event()

    async def slow(ask: Ask) -> Plan:
        asked.set()
        await go.wait()
        return Plan(expression="2 + 2")

    slow_backend = ScriptedBackend({"planner": slow, "solver": lambda ask: Answer(value=4)})
    other_backend = ScriptedBackend()
    async with (
        open_session(backend=slow_backend, store=path) as one,
        open_session(backend=other_backend, store=path) as other,
    ):
        run = one.prepare(graph, Puzzle(text="2 cows"))

        async def drive() -> None:
            assert (await one.resume(graph, run)).value == 4

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drive)
            await asked.wait()
            with pytest.raises(ResumeError, match=f"run {run} is under way in another process that uses .*runs.db"):
                await other.resume(graph, run)
            assert other.store.run(run).state == "running"
            go.set()
        assert other_backend.asks == [] and other.store.run(run).state == "finished"


@pytest.mark.anyio
async def test_two_drivers_share_the_runs_of_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    puzzles = [Puzzle(text=f"{n} cows") for n in range(12)]

    def backend() -> ScriptedBackend:
        async def plan(ask: Ask) -> Plan:
            await anyio.lowlevel.checkpoint()
            return Plan(expression="2 + 2")

        return ScriptedBackend({"planner": plan, "solver": lambda ask: Answer(value=4)})

    mine, others = backend(), backend()
    async with open_session(backend=mine, store=path) as one, open_session(backend=others, store=path) as other:
        broken = ScriptedBackend()
        async with open_session(backend=broken, store=path) as first:
            await first.map(graph, puzzles)
            batch = first.batch
        assert batch is not None
        async with anyio.create_task_group() as tasks:
            for session in (one, other):
                tasks.start_soon(lambda s=session: s.resume_batch(graph, batch, concurrency=2))
        assert {run.state for run in one.store.runs(batch)} == {"finished"}
        rows = one.store.query("SELECT run, path, count(*) AS n FROM asks WHERE error IS NULL GROUP BY run, path")
    assert len(rows) == 24 and all(row["n"] == 1 for row in rows)
    assert mine.asks and others.asks and len(mine.asks) + len(others.asks) == 24


@pytest.mark.anyio
async def test_runs_that_another_driver_resumed_are_read_back_not_run_again(tmp_path: Path) -> None:
    """`metier run` goes on while `metier resume` takes what it has not come to yet."""
    path = tmp_path / "runs.db"
    asked, go = anyio.Event(), anyio.Event()

    async def slow(ask: Ask) -> Plan:
        asked.set()
        await go.wait()
        return Plan(expression="2 + 2")

    mine = ScriptedBackend({"planner": slow, "solver": lambda ask: Answer(value=4)})
    others = ScriptedBackend({"planner": lambda ask: Plan(expression="3 + 3"), "solver": lambda ask: Answer(value=6)})
    async with open_session(backend=mine, store=path) as one, open_session(backend=others, store=path) as other:
        results = []

        async def drive() -> None:
            results.extend(await one.map(graph, [Puzzle(text=f"{n} cows") for n in range(5)], concurrency=1))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drive)
            await asked.wait()
            assert one.batch is not None
            others_results = await other.resume_batch(graph, one.batch)
            go.set()
        assert isinstance(others_results[0].error, RunTakenError)
        assert [result.output.value for result in others_results[1:]] == [6, 6, 6, 6]
        assert [result.output.value for result in results] == [4, 6, 6, 6, 6]
        assert len(mine.asks) == 2 and len(others.asks) == 8
        assert {run.state for run in one.store.runs(one.batch)} == {"finished"}


@pytest.mark.anyio
async def test_what_another_driver_left_half_done_goes_on_from_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    asked, go = anyio.Event(), anyio.Event()

    async def slow(ask: Ask) -> Plan:
        asked.set()
        await go.wait()
        return Plan(expression="2 + 2")

    async def never(ask: Ask) -> Answer:
        stuck.set()
        await anyio.sleep_forever()
        raise AssertionError

    stuck = anyio.Event()
    mine = ScriptedBackend({"planner": slow, "solver": lambda ask: Answer(value=4)})
    others = ScriptedBackend({"planner": lambda ask: Plan(expression="3 + 3"), "solver": never})
    async with open_session(backend=mine, store=path) as one, open_session(backend=others, store=path) as other:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: one.map(graph, [Puzzle(text="1"), Puzzle(text="2")], concurrency=1))
            await asked.wait()
            async with anyio.create_task_group() as stopped:
                stopped.start_soon(other.resume_batch, graph, one.batch)
                await stuck.wait()
                stopped.cancel_scope.cancel()
            assert one.batch is not None
            assert [run.state for run in one.store.runs(one.batch)] == ["running", "stopped"]
            go.set()
        assert {run.state for run in one.store.runs(one.batch)} == {"finished"}
    assert [ask.role for ask in mine.asks] == ["planner", "solver", "solver"]


def test_a_driver_that_is_killed_frees_its_runs(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    read, write = os.pipe()
    words = ["run", WORKFLOW, "--tasks", "test:4", "--engine", "scripted", "--store", str(path)]
    process = subprocess.Popen(
        [*COMMAND, *words], env=os.environ | {"TEST_HANG": str(write)}, pass_fds=[write], stderr=subprocess.DEVNULL
    )
    try:
        assert os.read(read, 4) == b"here"
        with RunStore(path) as store:
            stuck = f"{store.batches()[0].id}.3"
            with pytest.raises(ResumeError, match="under way in another process"), store.claim(stuck):
                pass
            process.send_signal(signal.SIGKILL)
            process.wait()
            with store.claim(stuck):
                pass
    finally:
        process.kill()
        process.wait()
        os.close(read)
        os.close(write)


def test_two_commands_write_one_store_at_once(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    words = ["run", WORKFLOW, "--tasks", "test:20", "--engine", "scripted", "--store", str(path)]
    running = [subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*), count(DISTINCT batch) FROM runs WHERE state = 'finished'").fetchone() == (
            40,
            2,
        )
        assert db.execute("SELECT count(*) FROM steps WHERE state = 'done'").fetchone() == (80,)


def test_a_new_store_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    for number in range(10):
        path, ready = tmp_path / f"{number}.db", threading.Barrier(6)

        def open_it(path: Path = path, ready: threading.Barrier = ready) -> int:
            ready.wait(30)
            with RunStore(path) as store:
                return len(store.batches())

        with ThreadPoolExecutor(6) as threads:
            assert [found.result() for found in [threads.submit(open_it) for _ in range(6)]] == [0] * 6


TASKS = 40
OTHERS = 2


def three_drivers(folder: Path, seed: int, *, hangs: bool = False) -> int:
    """`metier run` held at its fourth run while two `metier resume` share the rest; any of them may be killed (-9).

    It is let go by an ask of one of the others, or when both have ended. When it `hangs` it is stopped meanwhile
    (SIGSTOP) and none is killed. Returns how many were killed.
    """
    chance = random.Random(seed)
    store = folder / "runs.db"
    here, hang = os.pipe()
    go, release = os.pipe()

    def dies(first: int, last: int) -> dict[str, str]:
        return {"TEST_DIE_AT": str(chance.randint(first, last))} if not hangs and chance.random() < 0.5 else {}

    words = ["run", WORKFLOW, "--tasks", f"test:{TASKS}", "--engine", "scripted", "--concurrency", "1"]
    holding = os.environ | {"TEST_HANG": str(hang), "TEST_GO": str(go)} | dies(9, 20)
    first = start([*words, "--store", str(store)], holding, (hang, go))
    drivers = [first]
    try:
        assert os.read(here, 4) == b"here"
        if hangs:
            first.send_signal(signal.SIGSTOP)
        early = not hangs and chance.random() < 0.5
        for number in range(OTHERS):
            lets_go = {"TEST_RELEASE": str(release), "TEST_RELEASE_AT": str(chance.randint(1, 30))}
            changed = dies(1, 30) | (lets_go if early and not number else {})
            drivers.append(start(["resume", "--store", str(store)], os.environ | changed, (release,)))
        said = [process.communicate(timeout=120)[1] for process in drivers[1:]]
        shared = finished_by_others(store)
        if hangs:
            first.send_signal(signal.SIGCONT)
        elif not early and chance.random() < 0.5:
            first.kill()
        os.write(release, b"1")
        said.append(first.communicate(timeout=120)[1])
    finally:
        for process in drivers:
            process.kill()
            process.communicate()
        for descriptor in (here, hang, go, release):
            os.close(descriptor)
    last = start(["resume", "--store", str(store)], dict(os.environ))
    said.append(last.communicate(timeout=120)[1])
    assert not any("Traceback" in text or "failed" in text for text in said), said
    assert shared, "the others had nothing to do: this tried nothing"
    check_nothing_lost(store)
    return sum(process.returncode == -signal.SIGKILL for process in drivers)


def finished_by_others(store: Path) -> int:
    """Steps that are done beyond those of the first driver, which is held at its eighth."""
    with sqlite3.connect(store) as db:
        done: int = db.execute("SELECT count(*) FROM steps WHERE state = 'done'").fetchone()[0]
    return done - 7


def start(words: list[str], environment: dict[str, str], pipes: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [*COMMAND, *words],
        env=environment,
        pass_fds=pipes,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_nothing_lost(store: Path) -> None:
    """Every run has finished with the right output and score, and no step was answered twice."""
    with sqlite3.connect(store) as db:
        runs = db.execute("SELECT state, output, score FROM runs ORDER BY rowid").fetchall()
        answered = db.execute("SELECT count(*) FROM asks WHERE error IS NULL GROUP BY run, path").fetchall()
        steps = db.execute("SELECT count(*) FROM steps WHERE state = 'done'").fetchone()
    right = [("finished", f'{{"value":{number}}}', 1.0) for number in range(TASKS)]
    right[1] = ("finished", '{"value":-1}', 0.0)
    assert runs == right
    assert answered == [(1,)] * (2 * TASKS) and steps == (2 * TASKS,)


@pytest.mark.parametrize("seed", range(2))
def test_three_drivers_never_undo_each_other(tmp_path: Path, seed: int) -> None:
    three_drivers(tmp_path, seed)


def test_a_driver_that_hangs_keeps_its_runs_and_loses_none(tmp_path: Path) -> None:
    three_drivers(tmp_path, 2, hangs=True)


@pytest.mark.faults
def test_three_drivers_with_kills_fifty_times(tmp_path: Path) -> None:
    kills = 0
    for seed in range(100, 150):
        (tmp_path / f"{seed}").mkdir()
        kills += three_drivers(tmp_path / f"{seed}", seed)
    print(f"{kills} drivers killed")
    assert kills >= 40


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(200, 230))
def test_a_driver_that_hangs_thirty_times(tmp_path: Path, seed: int) -> None:
    three_drivers(tmp_path, seed, hangs=True)
