"""What orchestration costs: CPU per ask with a backend that answers at once, and memory over many runs.

    python benchmarks/orchestration.py --runs 1000 --rounds 5

Paired with the same asks made directly to the backend; store on (a SQLite file), three asks a run.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import anyio
from pydantic import BaseModel

from metier.agents import Ask, Role, ScriptedBackend, TaskGraph, render_prompt
from metier.runtime import RunStore, open_session


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    expression: str


class Answer(BaseModel):
    value: int


class Verdict(BaseModel):
    correct: bool


planner = Role("planner", takes=Puzzle, gives=Plan, instructions="Turn the puzzle into one expression.")
solver = Role("solver", takes=Plan, gives=Answer, instructions="Evaluate the expression.")
critic = Role("critic", takes=(Puzzle, Answer), gives=Verdict, instructions="Say whether the answer fits.")

graph = TaskGraph("chain", takes=Puzzle, gives=Verdict)
plan = graph.step(planner)
solve = graph.step(solver, after=plan)
graph.step(critic, after=solve)

REPLIES = {
    "planner": lambda ask: '{"expression":"1+2"}',
    "solver": lambda ask: '{"value":3}',
    "critic": lambda ask: '{"correct":true}',
}


async def direct(puzzles: list[Puzzle]) -> float:
    """CPU-seconds of the bare asks: prompt in, reply out, no graph, no store."""
    backend = ScriptedBackend(REPLIES, keep_asks=False)
    messages = render_prompt(planner, {"puzzle": puzzles[0]})
    began = time.process_time()
    for number in range(len(puzzles)):
        for role in ("planner", "solver", "critic"):
            await backend.reply(Ask(run_id=str(number), step_path=role, role=role, messages=messages))
    return time.process_time() - began


async def through_metier(puzzles: list[Puzzle], store: Path, concurrency: int) -> float:
    """CPU-seconds of the same asks as runs of a graph, recorded."""
    with RunStore(store) as runs:
        async with open_session(backend=ScriptedBackend(REPLIES, keep_asks=False), store=runs) as session:
            began = time.process_time()
            results = await session.map(graph, puzzles, concurrency=concurrency)
            used = time.process_time() - began
            assert all(result.error is None for result in results)
            assert session.batch is not None
            recorded = runs.query("SELECT count(*) AS n FROM steps")[0]["n"]
            assert recorded == 3 * len(puzzles), recorded
    return used


def resident_kib() -> int:
    """Resident memory now, in KiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="runs of the 3-step graph in a round")
    parser.add_argument("--concurrency", type=int, default=200, help="runs at a time")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds")
    options = parser.parse_args()
    puzzles = [Puzzle(text=f"3 cows and {i} ducks") for i in range(options.runs)]
    asks = 3 * options.runs
    added, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            bare = anyio.run(direct, puzzles)
            ours = anyio.run(through_metier, puzzles, Path(folder) / f"{number}.db", options.concurrency)
            memory.append(resident_kib())
            if number:  # the first round warms up
                added.append(1000 * (ours - bare) / asks)
    shown = ", ".join(f"{a:.3f}" for a in added)
    print(f"{options.runs} runs x 3 asks, {options.concurrency} at a time, store on, {options.rounds} paired rounds")
    print(f"CPU ms added per ask: median {median(added):.3f} ({min(added):.3f}-{max(added):.3f}); rounds: {shown}")
    growth = (memory[-1] - memory[0]) / (options.rounds * options.runs)
    print(f"resident KiB after each round: {memory}; growth per run after warm-up: {growth:.3f} KiB")


if __name__ == "__main__":
    main()
