"""What orchestration costs: CPU per ask with a backend that answers at once, and memory over many runs.

    python benchmarks/orchestration.py --runs 1000 --rounds 5

Paired with the same asks made directly to the backend; store on (a SQLite file), three asks a run.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import anyio
from harness import Samples, arguments, clocked, machine, paired_rounds, resident_mib, spread
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
    with clocked() as spent:
        for number in range(len(puzzles)):
            for role in ("planner", "solver", "critic"):
                await backend.reply(Ask(run_id=str(number), step_path=role, role=role, messages=messages))
    return spent.cpu_s


async def through_metier(puzzles: list[Puzzle], store: Path, concurrency: int) -> float:
    """CPU-seconds of the same asks as runs of a graph, recorded."""
    with RunStore(store) as runs:
        async with open_session(backend=ScriptedBackend(REPLIES, keep_asks=False), store=runs) as session:
            with clocked() as spent:
                results = await session.map(graph, puzzles, concurrency=concurrency)
            assert all(result.error is None for result in results)
            assert session.batch is not None
            recorded = runs.query("SELECT count(*) AS n FROM steps")[0]["n"]
            assert recorded == 3 * len(puzzles), recorded
    return spent.cpu_s


def main() -> None:
    """Print both tables."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--runs", type=int, default=1000, help="runs of the 3-step graph in a round")
    parser.add_argument("--concurrency", type=int, default=200, help="runs at a time")
    options = parser.parse_args()
    puzzles = [Puzzle(text=f"3 cows and {i} ducks") for i in range(options.runs)]
    cpu_s: Samples[str, float] = Samples(("direct", "metier"), options.journal)
    memory_mib = []
    with tempfile.TemporaryDirectory() as folder:
        for number, arm in paired_rounds(list(cpu_s), options.rounds):
            if arm == "direct":
                cpu_s.keep(number, arm, anyio.run(direct, puzzles))
                continue
            store = Path(folder) / f"{number}.db"
            cpu_s.keep(number, arm, anyio.run(through_metier, puzzles, store, options.concurrency))
            gc.collect()
            memory_mib.append(resident_mib())
    added = cpu_s.differences("metier", "direct", lambda used: 1000 * used / (3 * options.runs))
    shown = ", ".join(f"{a:.3f}" for a in added)
    print(f"{machine()}\n{options.runs} runs x 3 asks, {options.concurrency} at a time, store on,", end=" ")
    print(f"{options.rounds} paired rounds\nCPU ms added per ask: median {spread(added, '.3f')}; rounds: {shown}")
    growth = 1024 * (memory_mib[-1] - memory_mib[0]) / (options.rounds * options.runs)
    resident = ", ".join(f"{mib:.1f}" for mib in memory_mib)
    print(f"resident MiB after each round: {resident}; growth per run after warm-up: {growth:.3f} KiB")


if __name__ == "__main__":
    main()
