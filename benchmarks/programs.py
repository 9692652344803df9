"""Whole programs a minute: 24 programs, 16 at a time, adapters against the same engine without any.

    python benchmarks/programs.py --rounds 5

A program is a planner, then two rounds of solver and critic, 32 tokens an ask, each role on an adapter of its
own; later asks read what earlier ones wrote. Its twin has every role on the base, in an engine started without
adapters. The two take turns in one process, round by round, and the ratio is taken within a round. The adapters
are random and small: what they cost does not depend on what they say.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
from harness import Samples, arguments, clocked, machine, paired_rounds, spread
from pydantic import BaseModel
from random_adapters import shelve_random_adapters

from metier.agents import Role, TaskGraph
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, Session, load_settings, open_session
from metier.specializers.shelf.base_model import find_base

TOPICS = ["a bridge over a river", "a garden on a roof", "a library without books", "a clock that runs backwards"]
TOKENS_PER_ASK = 32
ROLES = ("planner", "solver", "critic")


class Brief(BaseModel):
    text: str


planner = Role(
    "planner", takes=Brief, gives=str, instructions="Plan the work in short steps.", max_tokens=TOKENS_PER_ASK
)
solver = Role(
    "solver",
    takes={"brief": Brief, "plan": str, "critique": str | None},
    gives=str,
    instructions="Carry out the plan; mind the critique.",
    max_tokens=TOKENS_PER_ASK,
)
critic = Role(
    "critic",
    takes={"brief": Brief, "plan": str, "draft": str},
    gives=str,
    instructions="Criticise the draft.",
    max_tokens=TOKENS_PER_ASK,
)

graph = TaskGraph("plan-solve-criticise", takes=Brief, gives=str)
plan = graph.step(planner)
with graph.loop("rounds", max_rounds=2, after=plan):
    draft = graph.step(solver, inputs={"plan": plan, "critique": "critic"})
    graph.step(critic, inputs={"plan": plan, "draft": draft})
graph.returns(draft)


@dataclass(frozen=True)
class Batch:
    """What one batch of programs took, and the tokens it wrote."""

    wall_s: float
    cpu_s: float
    tokens: int


async def measure(session: Session, briefs: list[Brief], concurrency: int) -> Batch:
    """Run one batch of programs."""
    with clocked() as spent:
        results = await session.map(graph, briefs, concurrency=concurrency)
    failed = [result.error for result in results if result.error is not None]
    if failed:
        raise failed[0]
    assert session.batch is not None
    rows = session.store.query(
        "SELECT sum(answer_tokens) AS n FROM asks JOIN runs ON runs.id = asks.run WHERE runs.batch = ?", session.batch
    )
    return Batch(spent.wall_s, spent.cpu_s, rows[0]["n"])


async def compare(options: argparse.Namespace, folder: Path) -> None:
    """Open both sessions, then measure them in turn."""
    adapters = shelve_random_adapters(folder, find_base(options.base), ROLES, rank=options.rank)
    assigned = Assignment(roles={role: RoleAssignment(variant=name) for role, name in adapters.items()})
    settings = load_settings(
        None,
        {"shelf": str(folder / "shelf"), "engine.adapter_slots": len(adapters), "engine.slot_rank": options.slot_rank},
    )
    briefs = [Brief(text=f"Describe {TOPICS[i % len(TOPICS)]}, number {i}.") for i in range(options.programs)]
    async with AsyncExitStack() as stack:
        sessions = {}
        for label, assignment in (("adapters", assigned), ("base", Assignment())):
            store = stack.enter_context(RunStore(":memory:"))
            sessions[label] = await stack.enter_async_context(
                open_session(base=options.base, assignment=assignment, store=store, settings=settings)
            )
            await sessions[label].start_engines()
        samples: Samples[str, Batch] = Samples(list(sessions), options.journal)
        for number, label in paired_rounds(list(sessions), options.rounds):
            # New briefs each round: the prefix cache must not remember whole programs.
            fresh = [Brief(text=f"Round {number}. {brief.text}") for brief in briefs]
            took = samples.keep(number, label, await measure(sessions[label], fresh, options.concurrency))
            print(
                f"round {number} {label}: {took.wall_s:.1f} s, {took.cpu_s:.1f} CPU-s, {took.tokens} tokens",
                flush=True,
            )
        report(samples, options)


def report(samples: Samples[str, Batch], options: argparse.Namespace) -> None:
    """Programs a minute, CPU-seconds a program, and the paired ratio."""
    print(f"\n{machine()}")
    print(f"{options.programs} programs, {options.concurrency} at a time, {options.rounds} paired rounds")
    for label in samples:
        per_minute = samples.values(label, lambda took: 60 * options.programs / took.wall_s)
        cpu = samples.values(label, lambda took: took.cpu_s / options.programs)
        tokens = samples[label][0].tokens
        print(f"{label:9} programs/min {spread(per_minute)}; CPU-s a program {spread(cpu)}; tokens {tokens}")
    print(f"adapters ÷ base, programs/min: {spread(samples.ratios('base', 'adapters', lambda took: took.wall_s))}")


def main() -> None:
    """Parse options and compare."""
    parser = arguments(__doc__, rounds=5, base=True)
    parser.add_argument("--programs", type=int, default=24, help="programs in a round")
    parser.add_argument("--concurrency", type=int, default=16, help="programs at a time")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--slot-rank", type=int, default=8, help="rank of the engine's slots")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        anyio.run(compare, options, Path(folder))


if __name__ == "__main__":
    main()
