"""Several drivers on one run store: different runs go on side by side, one run has one driver at a time."""

from __future__ import annotations

import os
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
from metier.agents.errors import ResumeError
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
