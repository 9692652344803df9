"""Eight adapters over four slots, against all eight resident, and against slots that do not know who runs next.

    python benchmarks/adapter_swap.py --rounds 5

A program is a loop of eight roles, each on an adapter of its own, in turn: the order that is worst for evicting the
longest idle. All read the same context of about a thousand tokens, which stays in the prefix cache, so that loads are
not hidden behind its prefill. Three engines live in one process and take turns, round by round; ratios are taken within
a round. Loads are compared with the fewest that the same uses, in the same order and overlapping as they did, allow
(Belady's optimum). The adapters are random and small: what they cost does not depend on what they say.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import anyio
from pydantic import BaseModel

from metier.agents import PROMPT_LAYOUT, Role, TaskGraph
from metier.agents.nodes import BuiltGraph
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, Session, load_settings, open_session
from metier.runtime.engines.pool import EnginePool
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.slots.slot_trace import SlotTrace, fewest_loads
from metier.specializers.shelf.base_model import base_fingerprint, find_base
from metier.specializers.shelf.shelf import Shelf
from metier.specializers.shelf.variant import AskSpec, EngineSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

ROLES = ("reader", "planner", "writer", "checker", "editor", "sceptic", "counter", "judge")
WORDS = "river bridge garden library clock market harbour window lantern orchard station letter".split()


class Brief(BaseModel):
    handbook: str
    task: str


@dataclass
class Contestant:
    """One session of the comparison and what was measured on it."""

    session: Session
    pool: EnginePool
    trace: SlotTrace
    slots: int
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @property
    def loads(self) -> int:
        """Adapter loads since the engine started."""
        return sum(counters.adapter_loads for counters in self.pool.counters())


def make_graph(rounds: int, tokens: int) -> BuiltGraph:
    """Rounds of the eight roles, each of which reads what the one before it wrote."""
    graph = TaskGraph("eight-roles", takes=Brief, gives=str)
    with graph.loop("round", max_rounds=rounds):
        before = None
        for name in ROLES:
            role = Role(
                name,
                takes={"brief": Brief, "draft": str | None},
                gives=str,
                instructions=f"You are the {name}. Go on from the draft.",
                max_tokens=tokens,
            )
            before = graph.step(role, after=before or (), inputs={"draft": before or ROLES[-1]})
    assert before is not None
    graph.returns(before)
    return graph.build()


def make_handbook(tokens: int) -> str:
    """About so many tokens of sentences that are not all alike."""
    chance = random.Random(0)
    sentence = "The {} is next to the {}, and nobody moves the {} before noon."
    return " ".join(sentence.format(*chance.sample(WORDS, 3)) for _ in range(tokens // 15))


async def measure(contestant: Contestant, graph: BuiltGraph, briefs: list[Brief], concurrency: int) -> None:
    """Run the briefs, and note wall and process CPU seconds."""
    wall, cpu = time.monotonic(), time.process_time()
    results = await contestant.session.map(graph, briefs, concurrency=concurrency)
    contestant.wall_s.append(time.monotonic() - wall)
    contestant.cpu_s.append(time.process_time() - cpu)
    failed = [result.error for result in results if result.error is not None]
    if failed:
        raise failed[0]


async def compare(options: argparse.Namespace, folder: Path) -> None:
    """Open the sessions, then measure them in turn."""
    weights = find_base(options.base)
    shelf, variants = write_adapters(folder, weights, options.rank)
    assignment = Assignment(roles={role: RoleAssignment(variant=name) for role, name in variants.items()})
    kinds = {
        f"all {len(ROLES)} resident": (len(ROLES), True),
        f"{options.slots} slots, foresight": (options.slots, True),
        f"{options.slots} slots, none": (options.slots, False),
    }
    graph, handbook = make_graph(options.loop_rounds, options.tokens), make_handbook(options.context)
    async with AsyncExitStack() as stack:
        contestants = {}
        for label, (slots, foresight) in kinds.items():
            engine = EngineSettings(
                adapter_slots=slots,
                foresight=foresight,
                slot_rank=8,
                kv_cache_mib=options.kv_cache_mib,
                threads=options.threads,
                eager=not options.compiled,
            )
            trace = SlotTrace()
            pool = EnginePool(
                weights, lambda name: (shelf.get(name), shelf.path(shelf.get(name))), engine, on_adapter_use=trace
            )
            await stack.enter_async_context(pool)
            await pool.warm(assignment.names())
            store = stack.enter_context(RunStore(":memory:"))
            settings = load_settings(None, {"engine": engine.model_dump()})
            session = await stack.enter_async_context(
                open_session(backend=pool, assignment=assignment, store=store, settings=settings)
            )
            contestants[label] = Contestant(session, pool, trace, slots)
        for number in range(options.rounds + 1):
            # New tasks each round: only the handbook is remembered.
            briefs = [Brief(handbook=handbook, task=f"Task {number}.{i}.") for i in range(options.programs)]
            turn = number % len(contestants)
            for label in (*list(contestants)[turn:], *list(contestants)[:turn]):
                await measure(contestants[label], graph, briefs, options.concurrency)
                shown = contestants[label]
                print(
                    f"round {number} {label}: {shown.wall_s[-1]:.1f} s, {shown.cpu_s[-1]:.1f} CPU-s, {shown.loads}"
                    f" loads so far, fewest {fewest_loads(shown.trace.events, shown.slots)}",
                    flush=True,
                )
        for contestant in contestants.values():  # the first round warms up
            del contestant.wall_s[0], contestant.cpu_s[0]
        print_table(contestants, options)


def print_table(contestants: dict[str, Contestant], options: argparse.Namespace) -> None:
    """Seconds, their paired ratio to all resident, and loads against the optimum."""
    print(
        f"\n{options.programs} programs of {options.loop_rounds} rounds x {len(ROLES)} roles, {options.concurrency} at"
        f" a time, {options.tokens} tokens an ask, {options.rounds} paired rounds; loads include the warm-up"
    )
    resident = next(iter(contestants.values()))
    for label, measured in contestants.items():
        wall = [a / b for a, b in zip(measured.wall_s, resident.wall_s, strict=True)]
        cpu = [a / b for a, b in zip(measured.cpu_s, resident.cpu_s, strict=True)]
        fewest = fewest_loads(measured.trace.events, measured.slots)
        totals = measured.pool.totals()["base"]
        rows = measured.session.store.query(
            "SELECT sum(swap_s) AS swap_s, sum(queue_s) AS queue_s, sum(cached_tokens) * 1.0 / sum(prompt_tokens) AS c,"
            " count(*) AS n FROM asks"
        )[0]
        print(
            f"\n{label}\n  wall s {show(measured.wall_s)}, x {show(wall)}; CPU-s {show(measured.cpu_s)}, x {show(cpu)}"
        )
        print(
            f"  loads {measured.loads} ({totals['adapter_prefetches']} ahead), fewest for the same uses {fewest}:"
            f" x {measured.loads / fewest:.3f}; swap s {rows['swap_s']:.2f} and queue s {rows['queue_s']:.1f} over"
            f" {rows['n']} asks; prompt tokens cached {100 * rows['c']:.0f} %"
        )


def show(values: list[float]) -> str:
    """Median and spread."""
    return f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def write_adapters(folder: Path, weights: Path, rank: int) -> tuple[Shelf, dict[str, str]]:
    """A random adapter for each role on a shelf of their own: role → variant name."""
    from tiny_model import write_random_lora

    shelf, names, fingerprint = Shelf(folder / "shelf"), {}, base_fingerprint(weights)
    for seed, role in enumerate(ROLES):
        staging = folder / f"staging-{role}"
        write_random_lora(staging / "adapter", weights, rank=rank, seed=seed, weight_std=0.01, dtype="bfloat16")
        record = {
            "base": fingerprint,
            "prompt_layout": PROMPT_LAYOUT,
            "engine": EngineSpec(base=fingerprint),
            "ask": AskSpec(adapter="lora", rank=rank),
        }
        shelf.add(staging, name=f"random-{role}", record=record)
        names[role] = f"random-{role}"
    return shelf, names


def main() -> None:
    """Parse options and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--slots", type=int, default=4, help="adapter slots where not all are resident (default 4)")
    parser.add_argument("--programs", type=int, default=6, help="programs in a round (default 6)")
    parser.add_argument("--concurrency", type=int, default=6, help="programs at a time (default 6)")
    parser.add_argument("--loop-rounds", type=int, default=2, help="rounds of the eight roles in a program (default 2)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per ask (default 16)")
    parser.add_argument("--context", type=int, default=1000, help="tokens of the shared context (default 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default 5)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default 8)")
    parser.add_argument("--threads", type=int, help="CPU threads per engine (default: all)")
    parser.add_argument("--kv-cache-mib", type=int, default=768, help="key-value cache of each engine (default 768)")
    parser.add_argument("--compiled", action="store_true", help="engines with torch.compile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        anyio.run(compare, options, Path(folder))


if __name__ == "__main__":
    main()
