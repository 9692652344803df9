"""Whole programs a minute: 24 programs, 16 at a time, adapters against the same engine without any.

    python benchmarks/programs.py --rounds 5

A program is a planner, then two rounds of solver and critic, 32 tokens an ask, each role on an adapter of its
own; later asks read what earlier ones wrote. Its twin has every role on the base, in an engine started without
adapters. The two take turns in one process, round by round, and the ratio is taken within a round. The adapters
are random and small: what they cost does not depend on what they say.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

import anyio
from pydantic import BaseModel

from metier.agents import PROMPT_LAYOUT, Role, TaskGraph
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, Session, load_settings, open_session
from metier.specializers.shelf.base_model import base_fingerprint, find_base
from metier.specializers.shelf.shelf import Shelf
from metier.specializers.shelf.variant import AskSpec, EngineSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TOPICS = ["a bridge over a river", "a garden on a roof", "a library without books", "a clock that runs backwards"]
TOKENS_PER_ASK = 32


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


async def measure(session: Session, briefs: list[Brief], concurrency: int) -> tuple[float, float, int]:
    """Wall seconds, process CPU seconds, and generated tokens of one batch of programs."""
    wall, cpu = time.monotonic(), time.process_time()
    results = await session.map(graph, briefs, concurrency=concurrency)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    failed = [result.error for result in results if result.error is not None]
    if failed:
        raise failed[0]
    assert session.batch is not None
    rows = session.store.query(
        "SELECT sum(answer_tokens) AS n FROM asks JOIN runs ON runs.id = asks.run WHERE runs.batch = ?", session.batch
    )
    return wall, cpu, rows[0]["n"]


async def compare(options: argparse.Namespace, folder: Path) -> None:
    """Open both sessions, then measure them in turn."""
    adapters = write_adapters(folder, options.base, options.rank)
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
        results: dict[str, list[tuple[float, float, int]]] = {label: [] for label in sessions}
        for number in range(options.rounds + 1):
            # New briefs each round: the prefix cache must not remember whole programs.
            fresh = [Brief(text=f"Round {number}. {brief.text}") for brief in briefs]
            for label in sessions if number % 2 else reversed(sessions):
                measured = await measure(sessions[label], fresh, options.concurrency)
                if number:  # the first round warms up
                    results[label].append(measured)
                print(
                    f"round {number} {label}: {measured[0]:.1f} s, {measured[1]:.1f} CPU-s, {measured[2]} tokens",
                    flush=True,
                )
    print_table(results, options)


def print_table(results: dict[str, list[tuple[float, float, int]]], options: argparse.Namespace) -> None:
    """Programs a minute, CPU-seconds a program, and the paired ratio."""
    print(f"\n{options.programs} programs, {options.concurrency} at a time, {options.rounds} paired rounds")
    for label, measured in results.items():
        per_minute = [60 * options.programs / wall for wall, _, _ in measured]
        cpu = [cpu / options.programs for _, cpu, _ in measured]
        print(f"{label:9} programs/min {show(per_minute)}; CPU-s a program {show(cpu)}; tokens {measured[0][2]}")
    ratios = [base[0] / ours[0] for ours, base in zip(results["adapters"], results["base"], strict=True)]
    print(f"adapters ÷ base, programs/min: {show(ratios)}")


def show(values: list[float]) -> str:
    """Median and spread."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def write_adapters(folder: Path, base: str, rank: int) -> dict[str, str]:
    """Three random adapters on a shelf of their own: role → variant name."""
    from tiny_model import write_random_lora

    weights = find_base(base)
    shelf = Shelf(folder / "shelf")
    names = {}
    for seed, role in enumerate(("planner", "solver", "critic")):
        staging = folder / f"staging-{role}"
        write_random_lora(staging / "adapter", weights, rank=rank, seed=seed, weight_std=0.01)
        fingerprint = base_fingerprint(weights)
        record = {
            "base": fingerprint,
            "prompt_layout": PROMPT_LAYOUT,
            "engine": EngineSpec(base=fingerprint),
            "ask": AskSpec(adapter="lora", rank=rank),
        }
        shelf.add(staging, name=f"random-{role}", record=record)
        names[role] = f"random-{role}"
    return names


def main() -> None:
    """Parse options and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--programs", type=int, default=24, help="programs in a round")
    parser.add_argument("--concurrency", type=int, default=16, help="programs at a time")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--slot-rank", type=int, default=8, help="rank of the engine's slots")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        anyio.run(compare, options, Path(folder))


if __name__ == "__main__":
    main()
