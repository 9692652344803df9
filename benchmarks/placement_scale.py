"""How placement, and the driver behind it, do as replicas grow to 1,000 and adapters to 10,000: simulated.

    python benchmarks/placement_scale.py --svg docs/placement-scale.svg

Every replica brings ten adapters and eight programs under way, and has four slots. A program is three asks, planner,
solver and critic, each on an adapter of its team's own; teams are drawn by Zipf's law. Steps cost what they do on the
machine the model was fitted on (`--fit STORE`; else the 135M model on two cores). Beside the curves:
what a decision takes as replicas grow, and what the driver's process holds for a run and for an adapter.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import anyio
from harness import arguments, clocked, machine, spread
from orchestration import Plan, Puzzle, Verdict, graph

from metier.agents import Ask, Reply
from metier.router.placement.placement import PlacedAsk, ReplicaState
from metier.runtime import RunStore, open_session
from metier.runtime.meters.percentiles import percentile
from metier.runtime.report.figures import svg_figure
from metier.runtime.simulator import ServiceModel, ServingPlan, SimulationResult, fit_service, read_programs, simulate
from metier.runtime.simulator.placing import PlacementName, costs_of, make_chooser
from metier.runtime.simulator.recorded_programs import Program, ProgramAsk, ProgramStep
from metier.specializers.shelf.variant import AskSpec, EngineSpec, Variant

POLICIES: tuple[PlacementName, ...] = ("placed", "placed-sample", "least-loaded", "round-robin", "adapter-hash")
ADAPTERS_A_REPLICA = 10
UNDER_WAY_A_REPLICA = 8
PROGRAMS_A_REPLICA = 24
SLOTS = 4
SEEDED_REPLICAS = 100
"""Above this, one draw of programs is tens of thousands of asks and says enough."""
MODEL = ServiceModel(step_s=0.0119, prompt_token_s=0.00032, row_s=0.00057, load_s=0.033, handoff_s=0.003)
ORCHESTRATION_S = 0.0001
"""CPU-seconds that a session adds to an ask (`orchestration.py`)."""


def made_up(replicas: int, seed: int) -> list[Program]:
    """Programs of teams drawn by Zipf's law (exponent 1): each has a prefix of its own that its asks share."""
    draw = random.Random(seed)
    teams = max(replicas * ADAPTERS_A_REPLICA // 3, 1)
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(teams)))
    programs = []
    for number in range(replicas * PROGRAMS_A_REPLICA):
        team = draw.choices(range(teams), cum_weights=weights)[0]
        asks = [
            ProgramAsk(role, f"{role}-{team}", 96 + 32 * place, draw.randint(16, 48), (2 * number, 2 * number + 1))
            for place, role in enumerate(("planner", "solver", "critic"))
        ]
        programs.append(Program(tuple(ProgramStep(a.role, (n - 1,) if n else (), a) for n, a in enumerate(asks))))
    return programs


def curve(replicas: int, policy: PlacementName, model: ServiceModel, seed: int) -> dict[str, Any]:
    """One point: latency, loads and messages an ask, and how busy the replicas were."""
    plan = ServingPlan(
        concurrency=replicas * UNDER_WAY_A_REPLICA, replicas=replicas, placement=policy, adapter_slots=SLOTS,
        foresight=False,
    )  # fmt: skip
    with clocked() as spent:
        outcome: SimulationResult = simulate(made_up(replicas, seed), model, plan)
    asks = len(outcome.ask_s)
    return {
        "replicas": replicas,
        "policy": policy,
        "asks": asks,
        "ask_p50_s": round(percentile(outcome.ask_s, 0.5), 3),
        "ask_p95_s": round(percentile(outcome.ask_s, 0.95), 3),
        "loads_an_ask": round(outcome.loads_per_ask, 3),
        # An ask and its reply; a load or an eviction is a request and an answer each.
        "messages_an_ask": round(2 + 2 * (outcome.loads + outcome.evictions) / asks, 2),
        "asks_per_s_a_replica": round(asks / outcome.completion_s / replicas, 2),
        "busy": round(outcome.busy, 3),
        "cpu_s": round(spent.cpu_s, 1),
    }


def decision_s(replicas: int, policy: PlacementName, model: ServiceModel, seconds: float = 0.3) -> float:
    """CPU-seconds of one decision among replicas that are all busy."""
    draw = random.Random(0)
    states = [
        ReplicaState(
            f"{number:05d}",
            SLOTS,
            {f"solver-{draw.randrange(replicas * ADAPTERS_A_REPLICA)}": draw.randrange(3) for _ in range(SLOTS)},
            draw.randrange(2000),
            {f"{draw.random()}": 96 for _ in range(UNDER_WAY_A_REPLICA)},
        )
        for number in range(replicas)
    ]
    choose = make_chooser(
        policy, states, costs_of(model, max_running=16, running=UNDER_WAY_A_REPLICA, output_tokens=32)
    )
    asks = [
        PlacedAsk(f"solver-{draw.randrange(replicas * ADAPTERS_A_REPLICA)}", f"{draw.random()}", 128, 32)
        for _ in range(64)
    ]
    began_s, made = time.process_time(), 0
    while time.process_time() - began_s < seconds:
        choose(asks[made % len(asks)])
        made += 1
    return (time.process_time() - began_s) / made


class Held:
    """A backend that answers nothing until everybody has asked, and notes what Python holds then."""

    def __init__(self, asks: int) -> None:
        self._missing = asks
        self._all = anyio.Event()
        self.bytes = 0

    async def reply(self, ask: Ask, *, on_text: Callable[[str], None] | None = None) -> Reply:
        if ask.role == "planner":
            self._missing -= 1
            if not self._missing:
                gc.collect()
                self.bytes = tracemalloc.get_traced_memory()[0]
                self._all.set()
            await self._all.wait()
            return Reply(text=Plan(expression="1+2").model_dump_json())
        return Reply(text='{"value":3}' if ask.role == "solver" else Verdict(correct=True).model_dump_json())


def bytes_a_run(runs: int = 2000) -> float:
    """What a session holds for a run that waits for an answer, all else being there already."""

    async def held(count: int) -> int:
        backend = Held(count)
        with RunStore(":memory:") as store:
            async with open_session(backend=backend, store=store) as session:
                await session.map(graph, [Puzzle(text=f"{n} cows") for n in range(count)], concurrency=count)
        return backend.bytes

    tracemalloc.start()
    few, many = anyio.run(held, 10), anyio.run(held, runs)
    tracemalloc.stop()
    return (many - few) / (runs - 10)


def bytes_an_adapter(adapters: int = 2000) -> dict[str, float]:
    """What a driver holds for an adapter it knows (its record), and for one that is resident (placement's state)."""

    def taken(make: Callable[[], Iterable[object]]) -> float:
        gc.collect()
        tracemalloc.start()
        kept = list(make())
        taken = tracemalloc.get_traced_memory()[0] / len(kept)
        tracemalloc.stop()
        return taken

    engine = EngineSpec(base="0123456789abcdef")
    return {
        "known": taken(
            lambda: (
                Variant(
                    id=f"{n:016x}", name=f"solver-{n}", base="0123456789abcdef", engine=engine,
                    ask=AskSpec(adapter="lora", rank=8), prompt_layout=1,
                )
                for n in range(adapters)
            )
        ),
        "resident": taken(lambda: [{f"{n:016x}": 1 for n in range(k, k + SLOTS)} for k in range(0, adapters, SLOTS)])
        / SLOTS,
    }  # fmt: skip


def draw(path: Path, points: Sequence[dict[str, Any]], decisions: Sequence[dict[str, float]]) -> None:
    """Three panels over the number of replicas: slow asks, loads, and asks a second against what one driver decides."""
    with svg_figure(path, 11.0, 3.4) as figure:
        slow, loads, driver = figure.subplots(1, 3)
        for policy in POLICIES:
            mine = [point for point in points if point["policy"] == policy]
            x = [point["replicas"] for point in mine]
            slow.plot(x, [point["ask_p95_s"] for point in mine], "o-", ms=3, label=policy)
            loads.plot(x, [point["loads_an_ask"] for point in mine], "o-", ms=3, label=policy)
        mine = [point for point in points if point["policy"] == "placed"]
        x = [point["replicas"] for point in mine]
        driver.plot(x, [p["replicas"] * p["asks_per_s_a_replica"] for p in mine], "k-", label="asks that come")
        for policy in ("placed", "placed-sample"):
            driver.plot(
                [row["replicas"] for row in decisions],
                [1 / (row[policy] + ORCHESTRATION_S) for row in decisions],
                "--",
                label=f"one core, {policy}",
            )
        slow.set_ylabel("p95 of an ask (s)")
        slow.set_yscale("log")
        slow.set_yticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
        loads.set_ylabel("adapter loads an ask")
        loads.set_ylim(bottom=0)
        driver.set_ylabel("asks a second")
        driver.set_yscale("log")
        for axes in (slow, loads, driver):
            axes.set_xscale("log")
            axes.set_xticks(x, [str(count) for count in x])
            axes.minorticks_off()
            axes.set_xlabel("replicas")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small")


def main() -> None:
    """Print the curves, one line a point, then the driver's costs; draw them where `--svg` says."""
    parser = arguments(__doc__)
    parser.add_argument("--replicas", default="2,10,30,100,300,1000", help="numbers of replicas")
    parser.add_argument("--fit", type=Path, help="run store to fit the model on")
    parser.add_argument("--batch", action="append", help="batch of that store, by id or label; may be repeated")
    parser.add_argument("--seeds", type=int, default=5, help=f"draws of programs, up to {SEEDED_REPLICAS} replicas")
    parser.add_argument("--svg", type=Path, help="figure to draw")
    options = parser.parse_args()
    model = MODEL
    if options.fit is not None:
        model = fit_service([read_programs(options.fit, name) for name in options.batch or (None,)])
    print(f"{machine()}\nmodel: {model.model_dump_json()}")
    counts = [int(part) for part in options.replicas.split(",")]
    points = []
    for replicas in counts:
        for policy in POLICIES:
            seeds = range(options.seeds if replicas <= SEEDED_REPLICAS else 1)
            drawn = [curve(replicas, policy, model, seed) for seed in seeds]
            points.append({name: median(p[name] for p in drawn) for name in drawn[0] if name != "policy"})
            points[-1]["policy"] = policy
            print(json.dumps(points[-1]), f"p95 {spread([p['ask_p95_s'] for p in drawn], '.3f')}", flush=True)
    decisions = []
    for replicas in counts:
        row = {policy: decision_s(replicas, policy, model) for policy in POLICIES}
        decisions.append({"replicas": float(replicas), **row})
        print(f"{replicas} replicas: " + ", ".join(f"{name} {1e6 * s:.1f} us" for name, s in row.items()), flush=True)
    print(f"a run that waits for an answer holds {bytes_a_run():.0f} bytes in the driver")
    print("an adapter holds " + ", ".join(f"{size:.0f} bytes {what}" for what, size in bytes_an_adapter().items()))
    if options.svg is not None:
        draw(options.svg, points, decisions)


if __name__ == "__main__":
    main()
