"""Eight adapters over four slots, against all eight resident, and against slots without foresight.

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
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
from harness import Samples, Spent, arguments, clocked, machine, paired_rounds, spread
from pydantic import BaseModel
from random_adapters import shelve_random_adapters

from metier.agents import Role, TaskGraph
from metier.agents.graphs.nodes import BuiltGraph
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, Session, load_settings, open_session
from metier.runtime.engines.pool import EnginePool
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.slots.slot_trace import SlotTrace, fewest_loads
from metier.specializers.shelf.base_model import find_base
from metier.specializers.shelf.shelf import Shelf

ROLES = ("reader", "planner", "writer", "checker", "editor", "sceptic", "counter", "judge")
WORDS = "river bridge garden library clock market harbour window lantern orchard station letter".split()


class Brief(BaseModel):
    handbook: str
    task: str


@dataclass
class Contestant:
    """One session of the comparison, and what its slots were used for."""

    session: Session
    pool: EnginePool
    trace: SlotTrace
    slots: int

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


async def measure(contestant: Contestant, graph: BuiltGraph, briefs: list[Brief], concurrency: int) -> Spent:
    """Run the briefs; wall and process CPU seconds."""
    with clocked() as spent:
        results = await contestant.session.map(graph, briefs, concurrency=concurrency)
    failed = [result.error for result in results if result.error is not None]
    if failed:
        raise failed[0]
    return spent


async def compare(options: argparse.Namespace, folder: Path) -> None:
    """Open the sessions, then measure them in turn."""
    weights = find_base(options.base)
    variants = shelve_random_adapters(folder, weights, ROLES, rank=options.rank, dtype="bfloat16")
    shelf = Shelf(folder / "shelf")
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
        samples: Samples[str, Spent] = Samples(list(contestants), options.journal)
        for number, label in paired_rounds(list(contestants), options.rounds):
            # New tasks each round: only the handbook is remembered.
            briefs = [Brief(handbook=handbook, task=f"Task {number}.{i}.") for i in range(options.programs)]
            shown = contestants[label]
            took = samples.keep(number, label, await measure(shown, graph, briefs, options.concurrency))
            print(
                f"round {number} {label}: {took.wall_s:.1f} s, {took.cpu_s:.1f} CPU-s, {shown.loads}"
                f" loads so far, fewest {fewest_loads(shown.trace.events, shown.slots)}",
                flush=True,
            )
        report(contestants, samples, options)


def report(contestants: dict[str, Contestant], samples: Samples[str, Spent], options: argparse.Namespace) -> None:
    """Seconds, their paired ratio to all resident, and loads against the optimum."""
    print(
        f"\n{machine()}\n{options.programs} programs of {options.loop_rounds} rounds x {len(ROLES)} roles,"
        f" {options.concurrency} at a time, {options.tokens} tokens an ask, {options.rounds} paired rounds;"
        " loads include the warm-up"
    )
    resident = next(iter(contestants))
    for label, measured in contestants.items():
        wall, cpu = (
            f"{spread(samples.values(label, of), '.3f')}, x {spread(samples.ratios(label, resident, of), '.3f')}"
            for of in (lambda s: s.wall_s, lambda s: s.cpu_s)
        )
        fewest = fewest_loads(measured.trace.events, measured.slots)
        totals = measured.pool.totals()["base"]
        rows = measured.session.store.query(
            "SELECT sum(swap_s) AS swap_s, sum(queue_s) AS queue_s, sum(cached_tokens) * 1.0 / sum(prompt_tokens) AS c,"
            " count(*) AS n FROM asks"
        )[0]
        print(f"\n{label}\n  wall s {wall}; CPU-s {cpu}")
        print(
            f"  loads {measured.loads} ({totals['adapter_prefetches']} ahead), fewest for the same uses {fewest}:"
            f" x {measured.loads / fewest:.3f}; swap s {rows['swap_s']:.2f} and queue s {rows['queue_s']:.1f} over"
            f" {rows['n']} asks; prompt tokens cached {100 * rows['c']:.0f} %"
        )


def main() -> None:
    """Parse options and compare."""
    parser = arguments(__doc__, rounds=5, base=True)
    parser.add_argument("--slots", type=int, default=4, help="adapter slots where not all are resident (default 4)")
    parser.add_argument("--programs", type=int, default=6, help="programs in a round (default 6)")
    parser.add_argument("--concurrency", type=int, default=6, help="programs at a time (default 6)")
    parser.add_argument("--loop-rounds", type=int, default=2, help="rounds of the eight roles in a program (default 2)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per ask (default 16)")
    parser.add_argument("--context", type=int, default=1000, help="tokens of the shared context (default 1000)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default 8)")
    parser.add_argument("--threads", type=int, help="CPU threads per engine (default: all)")
    parser.add_argument("--kv-cache-mib", type=int, default=768, help="key-value cache of each engine (default 768)")
    parser.add_argument("--compiled", action="store_true", help="engines with torch.compile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        anyio.run(compare, options, Path(folder))


if __name__ == "__main__":
    main()
