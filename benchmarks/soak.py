"""Whether anything grows that should not: over a day of simulated time, and for hours on a real engine.

    python benchmarks/soak.py simulated --hours 24
    python benchmarks/soak.py engine --minutes 120 --concurrency 50

`simulated`: programs of three asks, 50 at a time, through the simulator until its clock shows so many hours; then as
many runs through a session and a store on disk, on a backend that answers at once. `engine`: runs of three asks on a
supervised engine with a tiny random model and three adapters over two slots, until the time is up; every tenth batch is
cancelled in the middle. Both print resident memory, file descriptors, threads and the store's size as they go
and, at the end, by how much they grew in the second half, when everything has long been warm.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import anyio
import numpy as np
import psutil
from harness import machine, print_table
from placement_scale import MODEL, made_up
from pydantic import BaseModel

from metier.agents import PROMPT_LAYOUT, Role, ScriptedBackend, TaskGraph
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, load_settings, open_session
from metier.runtime.runs.session import Session
from metier.runtime.simulator import ServingPlan, simulate
from metier.specializers.shelf.base_model import base_fingerprint
from metier.specializers.shelf.shelf import Shelf
from metier.specializers.shelf.variant import AskSpec, EngineSpec

SEED = 11
BATCH_RUNS = 200
CANCELLED_EVERY, CANCELLED_AFTER_S = 10, 1.0
HEADS = ("", "runs", "asks", "ours MiB", "engine MiB", "descriptors", "threads", "store MiB", "store bytes/run")


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    ready: bool


class Verdict(BaseModel):
    correct: bool


planner = Role("planner", takes=Puzzle, gives=Plan, max_tokens=64)
solver = Role("solver", takes=(Puzzle, Plan), gives=Verdict, max_tokens=64)
critic = Role("critic", takes=(Puzzle, Plan, Verdict), gives=Plan, max_tokens=64)
graph = TaskGraph("soak", takes=Puzzle, gives=Plan)
graph.returns(graph.step(critic, after=graph.step(solver, after=graph.step(planner))))

REPLIES = {
    "planner": lambda ask: '{"ready":true}',
    "solver": lambda ask: '{"correct":true}',
    "critic": lambda ask: '{"ready":false}',
}


class Watch:
    """Looks at this process, at those it has started, and at the store; keeps and prints a row each time."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._rows: list[dict[str, float]] = []
        print("\t".join(HEADS), flush=True)

    def look(self, at: str, hours: float, runs: int) -> None:
        """One row, `hours` after the beginning."""
        me = psutil.Process()
        others = [process for process in me.children(recursive=True) if process.is_running()]
        kept = sum(file.stat().st_size for file in self._store.parent.glob(f"{self._store.name}*"))
        row = {
            "hours": hours,
            "runs": runs,
            "asks": 3 * runs,
            "ours MiB": me.memory_info().rss / 2**20,
            "engine MiB": sum(process.memory_info().rss for process in others) / 2**20,
            "descriptors": me.num_fds() + sum(process.num_fds() for process in others),
            "threads": me.num_threads() + sum(process.num_threads() for process in others),
            "store MiB": kept / 2**20,
            "store bytes/run": kept / max(runs, 1),
        }
        self._rows.append(row)
        print(f"{at}\t" + "\t".join(f"{row[head]:.1f}" for head in HEADS[1:]), flush=True)

    def grown(self) -> None:
        """Print by how much each column grew in the second half: a straight line through its rows."""
        half = self._rows[len(self._rows) // 2 :]
        if len(half) < 3:
            print("too short to say what grows")
            return
        hours, runs = (np.array([row[name] for row in half]) for name in ("hours", "runs"))
        rows = []
        for head in ("ours MiB", "engine MiB", "descriptors", "threads", "store MiB"):
            values = np.array([row[head] for row in half])
            an_hour = float(np.polyfit(hours, values, 1)[0])
            a_run = f"{2**20 * np.polyfit(runs, values, 1)[0]:+.0f}" if head.endswith("MiB") else ""
            rows.append((head, f"{values.min():.1f}-{values.max():.1f}", f"{an_hour:+.2f}", a_run))
        print_table(("second half", "lowest-highest", "an hour", "bytes a run"), rows)


def simulated_day(hours: float, concurrency: int) -> int:
    """Run programs through the simulator until its clock has come so far; how many there were."""
    programs, plan = made_up(16, SEED), ServingPlan(concurrency=concurrency, adapter_slots=4)
    sample = simulate(programs, MODEL, plan)
    count = int(len(programs) * hours * 3600 / sample.completion_s) + 1
    stop, began_s = threading.Event(), time.monotonic()

    def look() -> None:
        me = psutil.Process()
        while not stop.wait(10):
            print(f"  {time.monotonic() - began_s:.0f} s: {me.memory_info().rss / 2**20:.0f} MiB, {me.num_fds()} fds")

    watching = threading.Thread(target=look)
    watching.start()
    try:
        outcome = simulate(programs, MODEL, plan.model_copy(update={"programs": count}))
    finally:
        stop.set()
        watching.join()
    took_s, mib = time.monotonic() - began_s, psutil.Process().memory_info().rss / 2**20
    asks = len(outcome.ask_s)
    print(
        f"simulated {outcome.completion_s / 3600:.1f} h in {took_s:.0f} s: {count} programs, {asks} asks, "
        f"{outcome.loads} loads, {outcome.loads - outcome.evictions} resident at the end; {mib:.0f} MiB, of which "
        f"{16 * asks / 2**20:.0f} at least hold the two lists of seconds, of asks and of programs"
    )
    assert asks == 3 * count and len(outcome.program_s) == count
    return count


async def record_day(runs: int, concurrency: int, store: Path) -> None:
    """As many runs through a session and a store on disk, in batches; the backend answers at once."""
    watch, done, began_s = Watch(store), 0, time.monotonic()
    backend = ScriptedBackend(REPLIES, keep_asks=False)
    batch = max(runs // 96, 1)
    with RunStore(store) as kept:
        async with open_session(backend=backend, store=kept) as session:
            while done < runs:
                puzzles = [Puzzle(text=f"{done + number} cows") for number in range(min(batch, runs - done))]
                results = await session.map(graph, puzzles, concurrency=concurrency)
                assert all(result.error is None for result in results)
                done += len(puzzles)
                if done // batch % 4 == 0 or done == runs:
                    watch.look(f"{24 * done / runs:.1f} h", (time.monotonic() - began_s) / 3600, done)
            watch.grown()
        recorded = kept.query("SELECT count(*) AS n FROM steps WHERE state = 'done'")[0]["n"]
    assert recorded == 3 * runs, recorded


async def real_hours(minutes: float, concurrency: int, folder: Path) -> None:
    """Runs on a supervised engine until the time is up."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.tiny_model import write_random_lora, write_tiny_llama

    base, shelf, store = write_tiny_llama(folder / "base"), Shelf(folder / "shelf"), folder / "soak.db"
    print_id = base_fingerprint(base)
    roles = {}
    for number, role in enumerate((planner, solver, critic)):
        write_random_lora(folder / f"{number}" / "adapter", base, rank=8, seed=number)
        record = {
            "base": print_id, "prompt_layout": PROMPT_LAYOUT,
            "engine": EngineSpec(base=print_id).model_dump(), "ask": AskSpec(adapter="lora", rank=8).model_dump(),
        }  # fmt: skip
        shelf.add(folder / f"{number}", name=role.name, record=record)
        roles[role.name] = RoleAssignment(variant=role.name)
    tiny = {
        "eager": True, "kv_cache_mib": 64, "max_model_tokens": 512, "threads": 1, "slot_rank": 8, "adapter_slots": 2,
    }  # fmt: skip
    settings = load_settings(None, {f"engine.{name}": value for name, value in tiny.items()} | {"shelf": shelf.folder})
    async with open_session(
        base=base, assignment=Assignment(roles=roles), engine="supervised", store=store, settings=settings
    ) as session:
        await session.start_engines()
        await _until(session, 60 * minutes, concurrency, Watch(store))
        states = session.store.query("SELECT state, count(*) AS n FROM runs GROUP BY state")
        lost = session.store.query("SELECT count(*) AS n, sum(cpu_s) AS cpu_s FROM abandoned")[0]
        totals = session.engine_totals()
        again = session.store.query(
            "SELECT count(*) AS n FROM (SELECT 1 FROM asks WHERE error IS NULL GROUP BY run, path HAVING count(*) > 1)"
        )[0]["n"]
    print("runs:", {row["state"]: row["n"] for row in states}, f"asked twice: {again}")
    print(f"given up: {lost['n']} asks with {lost['cpu_s'] or 0:.2f} CPU-s on record; engine: {totals}")


async def _until(session: Session, seconds: float, concurrency: int, watch: Watch) -> None:
    began_s, looked_s, runs, batches = time.monotonic(), 0.0, 0, 0
    while (passed_s := time.monotonic() - began_s) < seconds:
        puzzles = [Puzzle(text=f"{runs + number} cows and {number % 7} ducks") for number in range(BATCH_RUNS)]
        batches += 1
        with anyio.move_on_after(CANCELLED_AFTER_S if batches % CANCELLED_EVERY == 0 else None) as scope:
            results = await session.map(graph, puzzles, concurrency=concurrency)
            assert all(result.error is None for result in results), next(r.error for r in results if r.error)
        runs += len(puzzles)
        if scope.cancelled_caught:
            continue
        if not looked_s or passed_s - looked_s >= min(60.0, seconds / 30):
            looked_s = passed_s
            watch.look(f"{passed_s / 60:.1f} min", passed_s / 3600, runs)
    watch.grown()


def main() -> None:
    """Parse options and soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("simulated", "engine", "both"), nargs="?", default="both")
    parser.add_argument("--hours", type=float, default=24.0, help="simulated hours (default 24)")
    parser.add_argument("--minutes", type=float, default=120.0, help="minutes on the engine (default 120)")
    parser.add_argument("--concurrency", type=int, default=50, help="runs at a time (default 50)")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        if options.part != "engine":
            runs = simulated_day(options.hours, options.concurrency)
            anyio.run(record_day, runs, options.concurrency, Path(folder) / "day.db")
        if options.part != "simulated":
            anyio.run(real_hours, options.minutes, options.concurrency, Path(folder))


if __name__ == "__main__":
    main()
