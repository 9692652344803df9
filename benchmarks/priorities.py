"""Short and long runs on one engine: when each ends, by our priority and in the order asks come.

    python benchmarks/priorities.py --base smollm2-135m --rounds 5

32 runs at a time, half of 1 round and half of 6, mixed; arriving at once, and one every `--every` seconds. Both orders
run in every round on the same engine with an empty prefix cache, and take turns in going first. Outputs must agree
token for token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Literal, NoReturn

import anyio
from harness import Samples, arguments, machine, paired_rounds, print_table, spread
from pydantic import BaseModel

from metier.agents import Role, TaskGraph
from metier.agents.graphs.nodes import BuiltGraph
from metier.router import PrioritySettings, Router
from metier.runtime import RunStore, Session, Settings
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.engines.pool import EnginePool
from metier.runtime.engines.variant_targets import EngineStart
from metier.runtime.meters.percentiles import percentile
from metier.runtime.settings.engine import EngineSettings
from metier.specializers.shelf.base_model import find_base

Order = Literal["first_come", "shortest_first"]
ORDERS: tuple[Order, Order] = ("first_come", "shortest_first")
ROUNDS = {"short": 1, "long": 6}
BINS = 12
Ended = dict[str, list[float]]
"""Seconds from arrival to end, by class of run."""


class Topic(BaseModel):
    text: str


writer = Role(
    "writer",
    takes={"topic": Topic, "earlier": str | None},
    gives=str,
    instructions="Write a very long story about the topic. Go on from where it stands.",
    max_tokens=24,
)


def workflow(rounds: int) -> BuiltGraph:
    """A loop that asks once a round and always has all its rounds."""
    graph = TaskGraph(f"rounds-{rounds}", takes=Topic, gives=str)
    with graph.loop("part", max_rounds=rounds):
        line = graph.step(writer)
    graph.returns(line)
    return graph.build()


GRAPHS = {kind: workflow(rounds) for kind, rounds in ROUNDS.items()}


def no_variants(name: str) -> NoReturn:
    """There are none here."""
    raise KeyError(name)


async def one_pass(
    pool: EnginePool, settings: Settings, order: Order, runs: int, every_s: float, label: str
) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds from arrival to end of every run, by class, and what each of them wrote."""
    settings = settings.model_copy(update={"priority": PrioritySettings(order=order)})
    kinds = ["short" if number % 2 else "long" for number in range(runs)]
    ended: dict[str, list[float]] = {kind: [] for kind in ROUNDS}
    wrote = [""] * runs
    with RunStore(":memory:") as store:
        session = Session(pool, Router(), store, settings)

        async def run(number: int) -> None:
            await anyio.sleep(number * every_s)
            began_s = time.monotonic()
            # The label in front makes every pass's prompts new to the prefix cache, and equal for both orders.
            topic = Topic(text=f"{label}: the {number}th lighthouse")
            wrote[number] = await session.run(GRAPHS[kinds[number]], topic)
            ended[kinds[number]].append(time.monotonic() - began_s)

        async with anyio.create_task_group() as tasks:
            for number in range(runs):
                tasks.start_soon(run, number)
    return ended, wrote


def p95(values: list[float]) -> float:
    """The 95th percentile."""
    return percentile(values, 0.95)


def histogram(values: list[float], top: float) -> str:
    """Counts in equal bins from 0 to `top`, as text."""
    counts = [0] * BINS
    for value in values:
        counts[min(int(BINS * value / top), BINS - 1)] += 1
    return " ".join(f"{count:3d}" for count in counts)


def show(arrival: str, passes: Samples[Order, Ended]) -> None:
    """Medians over the rounds with their ranges, the paired differences, and the distributions."""
    print(f"\n## {arrival}")
    rows = []
    classes = {"all": ("short", "long"), "short": ("short",), "long": ("long",)}
    for name, kinds in classes.items():
        for measure, of in (("mean", mean), ("p95", p95)):

            def figure(ended: Ended, kinds: Sequence[str] = kinds, of: Callable[[list[float]], float] = of) -> float:
                return of([value for kind in kinds for value in ended[kind]])

            ratios = passes.ratios("shortest_first", "first_come", figure)
            cells = [spread(passes.values(order, figure)) for order in ORDERS]
            rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            rows.append((name, measure, *cells, f"{median(ratios):.2f} ({rounds})"))
    print_table(("class", "measure", "first-come s", "ours s", "ours / first-come, per round"), rows)
    top = max(value for order in ORDERS for one in passes[order] for values in one.values() for value in values)
    print(f"runs ended, all rounds together, in bins of {top / BINS:.2f} s from 0:")
    for kind in ROUNDS:
        for order in ORDERS:
            values = [value for one in passes[order] for value in one[kind]]
            print(f"  {kind:5s} {order:14s} {histogram(values, top)}")


async def measure(options: argparse.Namespace) -> None:
    """All rounds of both arrivals on one engine; the journal has every run's seconds."""
    engine = EngineSettings(
        kv_cache_mib=512, max_model_tokens=512, max_running=options.running, threads=options.threads, dtype="float32"
    )
    settings = Settings(engine=engine)
    base = find_base(options.base)
    differing = compared = 0
    engines: list[InProcessEngine] = []

    async def start(wanted: EngineStart) -> InProcessEngine:
        engines.append(await InProcessEngine.start(wanted.weights, engine, adapters=False))
        return engines[-1]

    async with EnginePool(base, no_variants, engine, adapters=False, start_engine=start) as pool:
        await pool.warm()
        for arrival, every_s in (("arriving at once", 0.0), (f"one every {options.every} s", options.every)):
            passes: Samples[Order, Ended] = Samples(ORDERS, options.journal)
            texts: dict[Order, list[str]] = {}
            for number, order in paired_rounds(ORDERS, options.rounds):
                await reset_prefix_cache(engines[0])
                label = f"{arrival}, round {number}"
                ended, texts[order] = await one_pass(pool, settings, order, options.runs, every_s, label)
                passes.keep(number, order, ended)
                if len(texts) == len(ORDERS):
                    compared += options.runs
                    differing += sum(a != b for a, b in zip(*texts.values(), strict=True))
                    texts = {}
            show(arrival, passes)
    print(f"\noutputs that differ between the orders: {differing} of {compared}")


async def reset_prefix_cache(engine: InProcessEngine) -> None:
    """Nothing of one pass may help the next; engines have no public way to forget."""
    await engine._in_thread(lambda: engine._llm._llm.reset_prefix_cache())


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=5, base=True, threads=2)
    parser.add_argument("--runs", type=int, default=32, help="concurrent runs, half short and half long")
    parser.add_argument("--every", type=float, default=0.25, help="seconds between arrivals when staggered")
    parser.add_argument("--running", type=int, default=8, help="asks in one step of the engine")
    options = parser.parse_args()
    print(machine())
    anyio.run(measure, options)


if __name__ == "__main__":
    main()
