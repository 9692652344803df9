r"""Real batches to fit the simulator on and to check it against: other concurrencies, another assignment, fewer slots.

    python benchmarks/simulator_recording.py --store runs/simulator
    metier simulate runs/simulator/puzzles.db --batch "puzzles, 8" --validate runs/simulator/puzzles.db \
        --validate runs/simulator/puzzles-one-adapter.db --validate runs/simulator/puzzles-two-slots.db

Two workloads. `puzzles` is `examples/solve_and_check.py` with its trained adapters: short answers of any length, up to
three rounds. `programs` is that of `programs.py`: a planner, then two rounds of solver and critic, 32 tokens an ask,
all in step, so that a fit needs two batches. Each session has a store of its own, whose first batch warms its engine up
and is too small to be checked; no batch asks what an earlier one of its session has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
from harness import arguments, clocked
from programs import ROLES, TOPICS, Brief
from programs import graph as programs_graph
from pydantic import BaseModel
from random_adapters import shelve_random_adapters

from metier.agents import TaskGraph
from metier.agents.graphs.nodes import BuiltGraph
from metier.agents.graphs.workflow_file import load_workflow
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, load_settings, open_session
from metier.runtime.settings.engine import SlotRank
from metier.specializers.shelf.base_model import find_base

EXAMPLES = Path(__file__).parents[1] / "examples"
WORKLOADS = ("puzzles", "programs")
WARM_UP_RUNS = 3


@dataclass(frozen=True)
class Recording:
    """One session: the assignment, how many slots, and at which concurrencies it is recorded."""

    label: str
    variants: dict[str, str]
    slots: int
    concurrencies: tuple[int, ...]
    shelf: Path
    graph: TaskGraph | BuiltGraph
    inputs: Callable[[str, int, int], Sequence[BaseModel]]
    runs: int
    slot_rank: SlotRank = 16


def puzzles(runs: int) -> list[Recording]:
    """The example's own adapters, on its own tasks."""
    file = load_workflow(str(EXAMPLES / "solve_and_check.py"))

    def inputs(label: str, batch: int, count: int) -> list[BaseModel]:
        return [task.input for task in file.tasks(f"test:{count}:{100 + batch}")]

    own = {role: role for role in ROLES}
    variants = EXAMPLES / "variants"
    return [
        Recording("puzzles", own, 4, (8, 4, 16), variants, file.graph, inputs, runs),
        Recording("puzzles-one-adapter", {"solver": "solver"}, 4, (8, 16), variants, file.graph, inputs, runs),
        Recording("puzzles-two-slots", own, 2, (8, 16), variants, file.graph, inputs, runs),
    ]


def programs(runs: int, folder: Path, base: str) -> list[Recording]:
    """Random adapters: what they cost does not depend on what they say."""

    def inputs(label: str, batch: int, count: int) -> list[Brief]:
        topics = [TOPICS[i % len(TOPICS)] for i in range(count)]
        return [Brief(text=f"Batch {label} {batch}. Describe {t}, number {i}.") for i, t in enumerate(topics)]

    names, shelf = shelve_random_adapters(folder, find_base(base), ROLES, rank=8), folder / "shelf"
    one = {"planner": names["planner"], "solver": names["planner"]}
    return [
        Recording("programs", names, 4, (8, 4, 16), shelf, programs_graph, inputs, runs, 8),
        Recording("programs-one-adapter", one, 4, (8, 16), shelf, programs_graph, inputs, runs, 8),
        Recording("programs-two-slots", names, 2, (8, 16), shelf, programs_graph, inputs, runs, 8),
    ]


async def record(one: Recording, base: str, folder: Path) -> None:
    """Record one session's batches."""
    overrides = {"engine.adapter_slots": one.slots, "engine.slot_rank": one.slot_rank}
    settings = load_settings(None, {"shelf": str(one.shelf), **overrides})
    assigned = Assignment(roles={role: RoleAssignment(variant=name) for role, name in one.variants.items()})
    with RunStore(folder / f"{one.label}.db") as store:
        async with open_session(base=base, assignment=assigned, store=store, settings=settings) as session:
            for batch, concurrency in enumerate((WARM_UP_RUNS, *one.concurrencies)):
                inputs = one.inputs(one.label, batch, one.runs if batch else WARM_UP_RUNS)
                with clocked() as spent:
                    results = await session.map(
                        one.graph, inputs, concurrency=concurrency, label=f"{one.label}, {concurrency}",
                        options={"overrides": overrides, "concurrency": concurrency},
                    )  # fmt: skip
                failed = sum(result.error is not None for result in results)
                took = f"{spent.wall_s:.1f} s, {spent.cpu_s:.1f} CPU-s"
                print(f"{one.label} at {concurrency}: {took}, {failed} failed", flush=True)


def main() -> None:
    """Parse options and record."""
    parser = arguments(__doc__, base=True)
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="all by default")
    parser.add_argument("--runs", type=int, default=32, help="runs in a batch")
    parser.add_argument("--store", type=Path, default=Path("runs/simulator"), help="folder of the stores")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for workload in options.workload or WORKLOADS:
            made = workload == "programs"
            for one in programs(options.runs, Path(folder), options.base) if made else puzzles(options.runs):
                anyio.run(record, one, options.base, options.store)


if __name__ == "__main__":
    main()
