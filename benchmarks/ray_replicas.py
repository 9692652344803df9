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

import argparse
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

import anyio
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


async def turn(
    session: Session, graph: TaskGraph, number: int, replicas: int, at_once: int = PROGRAMS
) -> tuple[float, float]:
    """Programs a minute of one turn, and the CPU-seconds of its engines for each program."""
    before_s = sum(row["cpu_s"] for row in session.engine_totals().values())
    began_s = time.monotonic()
    # The same prompts for every set-up of a round, new ones in the next: no prompt is in a cache yet.
    puzzles = [Puzzle(text=f"Round {number}: {n} dogs and {n + number} spiders.") for n in range(PROGRAMS)]
    label = f"round {number}" if at_once == PROGRAMS else f"{at_once} at a time"
    results = await session.map(
        graph, puzzles, concurrency=at_once, label=label, options={"overrides": sizes(replicas)}
    )
    assert all(result.error is None for result in results)
    took_s = time.monotonic() - began_s
    cpu_s = sum(row["cpu_s"] for row in session.engine_totals().values()) - before_s
    return 60 * PROGRAMS / took_s, cpu_s / PROGRAMS


def sizes(replicas: int) -> dict[str, int]:
    """What every engine gets; as many asks at one as several have together: the batch is not what is compared."""
    return {
        "engine.kv_cache_mib": 256,
        "engine.max_model_tokens": 512,
        "engine.max_running": PROGRAMS // replicas,
    }


async def measure(rounds: int, tokens: int, eager: bool, store: Path | None) -> None:
    """Open the three, warm each up once, then let them take turns; print every turn and the medians."""
    ray = import_ray()
    ray.init(
        address="local", num_cpus=sum(r * t for r, t in ARMS.values()), include_dashboard=False, log_to_driver=False
    )
    graph, rows = programs(tokens), dict[str, list[tuple[float, float]]]({name: [] for name in ARMS})
    async with AsyncExitStack() as stack:
        sessions = {}
        for name, (replicas, threads) in ARMS.items():
            overrides = {"ray.replicas": replicas, "engine.threads": threads, "engine.eager": eager}
            settings = load_settings(overrides=overrides | sizes(replicas))
            path = ":memory:" if store is None else store / f"{name}.db"
            sessions[name] = await stack.enter_async_context(open_session(engine="ray", store=path, settings=settings))
            await turn(sessions[name], graph, 0, replicas)
            if store is not None and ARMS[name] == (1, 1):
                await turn(sessions[name], graph, -1, replicas, at_once=8)
        for number in range(1, rounds + 1):
            names = list(ARMS) if number % 2 else list(ARMS)[::-1]
            for name in names:
                rows[name].append(await turn(sessions[name], graph, number, ARMS[name][0]))
                print(f"round {number}  {name:28} {rows[name][-1][0]:7.1f} programs/min", flush=True)
    ray.shutdown()
    one = [rate for rate, _ in rows["one replica, one core"]]
    print(
        f"\n{PROGRAMS} programs at a time, {tokens} tokens an ask, {rounds} rounds, {'eager' if eager else 'compiled'}"
    )
    for name, turns in rows.items():
        rates, cpu_s = [rate for rate, _ in turns], [cpu for _, cpu in turns]
        ratios = [rate / other for rate, other in zip(rates, one, strict=True)]
        print(
            f"{name:28} {median(rates):7.1f} programs/min ({min(rates):.1f} to {max(rates):.1f}), "
            f"{median(cpu_s):.2f} engine CPU-s a program, "
            f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--store", type=Path, help="keep every turn in stores in this folder")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    given = parser.parse_args()
    anyio.run(measure, given.rounds, given.tokens, given.eager, given.store)
