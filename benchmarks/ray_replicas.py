r"""Programs a minute: two replicas on a core each, one replica on one core, one replica on both.

    python benchmarks/ray_replicas.py --rounds 5

Each program asks a planner and then a solver on SmolLM2, `--tokens` an ask; 32 programs go on at a time. The three
set-ups are open all the while, on one Ray, and take turns. Bar: two replicas do at least 1.4 times the programs
of one replica on one core.

With `--store FOLDER` every turn is kept, and one of the single core with 8 programs at a time, for the simulator:

    metier simulate "FOLDER/one replica, one core.db" --batch "8 at a time" --batch "round 1" \
        --validate "FOLDER/two replicas, a core each.db"
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
from harness import Samples, arguments, clocked, machine, paired_rounds, spread
from pydantic import BaseModel

from metier.agents import Role, TaskGraph
from metier.runtime import Session, open_session
from metier.runtime.ray.cluster import import_ray
from metier.runtime.settings.session import load_settings

PROGRAMS = 32
ARMS = {"two replicas, a core each": (2, 1), "one replica, one core": (1, 1), "one replica, both cores": (1, 2)}
"""Name → replicas, threads of each."""


class Puzzle(BaseModel):
    text: str


def programs(tokens: int) -> TaskGraph:
    """The workflow of one program."""
    graph = TaskGraph("program", takes=Puzzle, gives=str)
    instructions = "Write about it for as long as you can."
    plan = graph.step(Role("planner", takes=Puzzle, gives=str, instructions=instructions, max_tokens=tokens))
    solver = Role("solver", takes={"plan": str}, gives=str, instructions=instructions, max_tokens=tokens)
    graph.returns(graph.step(solver, after=plan))
    return graph


@dataclass(frozen=True)
class Turn:
    """Programs a minute of one turn, and the CPU-seconds of its engines for each program."""

    per_minute: float
    engine_cpu_s: float


async def turn(session: Session, graph: TaskGraph, number: int, replicas: int, at_once: int = PROGRAMS) -> Turn:
    """Run the programs once."""
    # The same prompts for every set-up of a round, new ones in the next: no prompt is in a cache yet.
    puzzles = [Puzzle(text=f"Round {number}: {n} dogs and {n + number} spiders.") for n in range(PROGRAMS)]
    label = f"round {number}" if at_once == PROGRAMS else f"{at_once} at a time"
    options = {"overrides": sizes(replicas)}
    with clocked(lambda: sum(row["cpu_s"] for row in session.engine_totals().values())) as spent:
        results = await session.map(graph, puzzles, concurrency=at_once, label=label, options=options)
    assert all(result.error is None for result in results)
    return Turn(60 * PROGRAMS / spent.wall_s, spent.cpu_s / PROGRAMS)


def sizes(replicas: int) -> dict[str, int]:
    """What every engine gets; as many asks at one as several have together: the batch is not what is compared."""
    return {
        "engine.kv_cache_mib": 256,
        "engine.max_model_tokens": 512,
        "engine.max_running": PROGRAMS // replicas,
    }


async def measure(rounds: int, tokens: int, eager: bool, store: Path | None, journal: Path | None) -> None:
    """Open the three, warm each up once, then let them take turns; print every turn and the medians."""
    ray = import_ray()
    ray.init(
        address="local", num_cpus=sum(r * t for r, t in ARMS.values()), include_dashboard=False, log_to_driver=False
    )
    graph, took = programs(tokens), Samples[str, Turn](list(ARMS), journal)
    async with AsyncExitStack() as stack:
        sessions = {}
        for name, (replicas, threads) in ARMS.items():
            overrides = {"ray.replicas": replicas, "engine.threads": threads, "engine.eager": eager}
            settings = load_settings(overrides=overrides | sizes(replicas))
            path = ":memory:" if store is None else store / f"{name}.db"
            sessions[name] = await stack.enter_async_context(open_session(engine="ray", store=path, settings=settings))
        for number, name in paired_rounds(list(ARMS), rounds):
            one = took.keep(number, name, await turn(sessions[name], graph, number, ARMS[name][0]))
            print(f"round {number}  {name:28} {one.per_minute:7.1f} programs/min", flush=True)
        if store is not None:
            await turn(sessions["one replica, one core"], graph, -1, 1, at_once=8)
    ray.shutdown()
    how = "eager" if eager else "compiled"
    print(f"\n{machine()}\n{PROGRAMS} programs at a time, {tokens} tokens an ask, {rounds} rounds, {how}")
    for name in took:
        rates, ratios = (
            took.values(name, lambda one: one.per_minute),
            took.ratios(name, "one replica, one core", lambda one: one.per_minute),
        )
        print(
            f"{name:28} {spread(rates, '.1f')} programs/min, "
            f"{spread(took.values(name, lambda one: one.engine_cpu_s))} engine CPU-s a program, {spread(ratios)}x"
        )


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--store", type=Path, help="keep every turn in stores in this folder")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    given = parser.parse_args()
    anyio.run(measure, given.rounds, given.tokens, given.eager, given.store, given.journal)
