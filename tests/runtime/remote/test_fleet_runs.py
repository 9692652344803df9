"""Whole runs on a fleet of servers of ours, over real sockets: placed, recorded, and gone on with when one goes."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio
import httpx
import pytest

from metier.agents import Ask, ScriptedBackend
from metier.agents.errors import EngineDeadError, UnknownVariantError
from metier.agents.graphs.workflow_file import load_workflow
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, Settings, open_session
from metier.runtime.cli.run import RunOptions, run_workflow
from metier.runtime.events import Event
from metier.runtime.settings.session import load_settings
from tests import workflow_for_cli
from tests.agents.workflow import Answer, Plan, Puzzle
from tests.runtime.served import Served, graph, scripted, server

TASKS = 800
KILLS = 40
HANGS = 30
QUICK = {
    "fleet.health_every_s": 0.1,
    "fleet.open_s": 0.1,
    "fleet.failures_to_open": 1,
    "remote.retry_wait_s": 0.1,
    "remote.retry_wait_max_s": 0.5,
    "remote.retries": 20,
}


def quick() -> Settings:
    return load_settings(overrides=QUICK)


@pytest.mark.anyio
async def test_a_session_on_two_servers_records_where_each_ask_went_and_why() -> None:
    assignment = Assignment(roles={"solver": RoleAssignment(variant="lora0", reason="best")})
    backends = [scripted(), scripted()]
    with server(backends[0], variants=["lora0"]) as one, server(backends[1], variants=["lora0"]) as two:
        engine = f"{one.url},{two.url}/v1"
        async with open_session(engine=engine, assignment=assignment, store=":memory:", settings=quick()) as session:
            results = await session.map(graph, [Puzzle(text=f"{n} cows") for n in range(12)], concurrency=6)
            assert [result.output.value for result in results] == [4] * 12
            rows = session.store.query("SELECT role, engine, reason FROM asks")
            totals = session.engine_totals()
        assert len(rows) == 24 and {row["engine"].split()[0] for row in rows} == {one.url, two.url}
        for row in rows:
            chosen, why = row["engine"].split()[0], row["reason"]
            assert f"; {chosen}: " in why and " tokens before it, " in why
            assert why.startswith("best; " if row["role"] == "solver" else "role 'planner' is not assigned")
            assert ("adapter" in why) == (row["role"] == "solver")
    assert {url: row["asks"] for url, row in totals.items()} == {
        served.url: len(backend.asks) for served, backend in zip((one, two), backends, strict=True)
    }


@pytest.mark.anyio
async def test_a_server_that_is_stopped_in_the_middle_costs_no_run() -> None:
    arrived, count = threading.Event(), iter(range(1000))

    async def plan(ask: Ask) -> Plan:
        if next(count) == 10:
            arrived.set()
        await anyio.lowlevel.checkpoint()
        return Plan(expression="2 + 2")

    def backend() -> ScriptedBackend:
        return ScriptedBackend({"planner": plan, "solver": lambda ask: Answer(value=4)})

    with server(backend()) as one, server(backend()) as two:

        def stop(served: Served) -> None:
            assert arrived.wait(60)
            served.stop()

        stopping = threading.Thread(target=stop, args=[one])
        stopping.start()
        async with open_session(engine=f"{one.url},{two.url}", store=":memory:", settings=quick()) as session:
            results = await session.map(graph, [Puzzle(text=f"{n} cows") for n in range(60)], concurrency=8)
            assert [result.error for result in results] == [None] * 60
            rows = session.store.query("SELECT count(*) AS n FROM asks WHERE error IS NULL GROUP BY run, path")
        stopping.join()
    assert [row["n"] for row in rows] == [1] * 120


@pytest.mark.anyio
async def test_a_variant_that_no_server_of_ours_serves_and_servers_that_are_gone_are_said_at_once() -> None:
    with server(scripted()) as one, server(scripted()) as two:
        urls = f"{one.url},{two.url}"
        with pytest.raises(UnknownVariantError, match="no server can serve variant 'lora9': .*is not served at"):
            async with open_session(engine=urls, store=":memory:", settings=quick(), variants=["lora9"]):
                pass
    with pytest.raises(EngineDeadError, match="no server takes asks: .*cannot be reached.*cannot be reached"):
        async with open_session(engine=urls, store=":memory:", settings=quick()):
            pass


def test_the_command_line_runs_on_two_servers_and_on_those_of_the_settings(tmp_path: Path) -> None:
    with server(workflow_for_cli.scripted()) as one, server(workflow_for_cli.scripted()) as two:
        named = {"fleet.servers": [{"url": one.url, "adapter_slots": 2}, {"url": two.url}]}
        for engine, overrides in ((f"{one.url},{two.url}", {}), ("fleet", named)):
            options = RunOptions(
                workflow=workflow_for_cli.__file__, input='{"text": "7"}', engine=engine, overrides=overrides
            )
            anyio.run(run_workflow, options, tmp_path / "runs.db")
    with RunStore(tmp_path / "runs.db") as store:
        assert [run.output for batch in store.batches() for run in store.runs(batch.id)] == ['{"value":7}'] * 2
        assert store.batches()[1].options["engine"] == "fleet"


# --- kill -9 --------------------------------------------------------------------------------------------------


class Mortal:
    """`metier serve` on a port of its own, which dies (-9) at an ask and is started again, `kills` times in all.

    Whenever it is up, `ups` is released. With `stop_every` it stops itself (SIGSTOP) at every n-th ask instead.
    """

    def __init__(
        self, port: int, kills: Iterator[int], store: Path, ups: threading.Semaphore, *, stop_every: int = 0
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.deaths = 0
        self._words = ["serve", workflow_for_cli.__file__, "--engine", "scripted", "--port", str(port)]
        self._words += ["--store", str(store)]
        self._kills, self._ups = kills, ups
        self._stop_every = stop_every
        self._over = False
        self.start()
        self._thread = threading.Thread(target=self._raise_again)

    def start(self) -> None:
        """Start it, to die at the ask that comes next in `kills`, or never when there are no more."""
        command = [sys.executable, "-c", "from metier.runtime.cli.main import main; main()", *self._words]
        environment = os.environ | {"TEST_DIE_AT": str(next(self._kills, 0)), "TEST_STOP_EVERY": str(self._stop_every)}
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        assert self._process.stderr is not None
        said = [b""]
        while b"serving" not in said[-1]:
            said.append(self._process.stderr.readline())
            assert said[-1], b"".join(said).decode()
        self._ups.release()

    def watch(self) -> None:
        """Start it again whenever it dies."""
        self._thread.start()

    def _raise_again(self) -> None:
        while self._process.wait() == -signal.SIGKILL and not self._over:
            self.deaths += 1
            self.start()

    def go_on_if_stopped(self) -> bool:
        """Let a process that is stopped go on; whether it was."""
        stopped = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        if stopped:
            self._process.send_signal(signal.SIGCONT)
        return stopped

    def close(self) -> None:
        """Stop it for good."""
        self._over = True
        self.go_on_if_stopped()
        self._process.terminate()
        self._thread.join(60)
        self._process.wait(60)


@contextmanager
def mortals(
    tmp_path: Path, kills: Iterator[int], ups: threading.Semaphore, stop_every: tuple[int, int] = (0, 0)
) -> Iterator[list[Mortal]]:
    with ExitStack() as stack, ExitStack() as ports:
        sockets = [ports.enter_context(socket.socket()) for _ in range(2)]
        for number in sockets:
            number.bind(("127.0.0.1", 0))
        free = [number.getsockname()[1] for number in sockets]
        ports.close()
        servers = []
        for index, port in enumerate(free):
            store = tmp_path / f"server{index}.db"
            mortal = Mortal(port, kills, store, ups, stop_every=stop_every[index])
            mortal.watch()
            stack.callback(mortal.close)
            servers.append(mortal)
        yield servers


@pytest.mark.faults
def test_kills_of_servers_lose_nothing(tmp_path: Path) -> None:
    chance = random.Random(11)
    kills = iter([chance.randint(5, 25) for _ in range(KILLS)])
    file = load_workflow(workflow_for_cli.__file__)
    ups = threading.Semaphore(0)
    with mortals(tmp_path, kills, ups) as servers:

        async def drive() -> None:
            engine = ",".join(mortal.url for mortal in servers)
            async with open_session(engine=engine, store=tmp_path / "runs.db", settings=quick()) as session:
                results = await session.map(file.graph, file.tasks(f"test:{TASKS}"), concurrency=8)
                assert [result.error for result in results] == [None] * TASKS

        anyio.run(drive)
        # The runs may have ended on one server while the other was still getting up.
        assert all(ups.acquire(timeout=120) for _ in range(KILLS + len(servers)))
        deaths = sum(mortal.deaths for mortal in servers)
        assert all(httpx.get(f"{mortal.url}/health").status_code == 200 for mortal in servers)
    assert deaths == KILLS
    with RunStore(tmp_path / "runs.db") as store:
        (batch,) = store.batches()
        runs = store.runs(batch.id)
        assert {run.state for run in runs} == {"finished"} and all(run.score is not None for run in runs)
        assert store.query("SELECT count(*) AS n FROM steps WHERE state = 'done'")[0]["n"] == 2 * TASKS
        answered = store.query("SELECT count(*) AS n FROM asks WHERE error IS NULL GROUP BY run, path")
        assert [row["n"] for row in answered] == [1] * (2 * TASKS)
        assert store.query("SELECT count(*) AS n FROM asks WHERE reason LIKE '%failed; %'")[0]["n"] > 0


@pytest.mark.faults
def test_servers_that_hang_lose_nothing(tmp_path: Path) -> None:
    """Two servers stop themselves again and again, and go on once the fleet has given them up."""
    lost, over, file = set[str](), threading.Event(), load_workflow(workflow_for_cli.__file__)
    hangs = 0
    settings = load_settings(overrides=QUICK | {"fleet.health_timeout_s": 0.5})

    def on_event(event: Event) -> None:
        if event.kind == "server_lost":
            lost.add(event.data["server"])
        elif event.kind == "server_back":
            lost.discard(event.data["server"])

    with mortals(tmp_path, iter(()), threading.Semaphore(0), stop_every=(37, 41)) as servers:

        def wake() -> None:
            nonlocal hangs
            while not over.wait(0.05):
                hangs += sum(mortal.go_on_if_stopped() for mortal in servers if mortal.url in lost)

        async def drive() -> int:
            engine, batches = ",".join(mortal.url for mortal in servers), 0
            store = tmp_path / "runs.db"
            async with open_session(engine=engine, store=store, settings=settings, on_event=on_event) as session:
                while hangs < HANGS:
                    results = await session.map(file.graph, file.tasks(f"test:100:{batches}"), concurrency=8)
                    assert [result.error for result in results] == [None] * 100
                    batches += 1
            return batches

        waking = threading.Thread(target=wake)
        waking.start()
        try:
            batches = anyio.run(drive)
        finally:
            over.set()
            waking.join()
    with RunStore(tmp_path / "runs.db") as store:
        runs = [run for batch in store.batches() for run in store.runs(batch.id)]
        assert {run.state for run in runs} == {"finished"}
        answered = store.query("SELECT count(*) AS n FROM asks WHERE error IS NULL GROUP BY run, path")
    assert [row["n"] for row in answered] == [1] * (2 * 100 * batches)
