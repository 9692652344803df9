"""Placement on two vLLM servers: the predicted finish against simpler rules, by loads and by the slowest asks.

    python benchmarks/fleet_placement.py --rounds 5

Two stock servers of one thread and two adapter slots each; eight adapters. A program is four asks in turn, planner and
solver twice, each on an adapter of its own kind; four kinds, the first the most frequent (Zipf). All rules choose from
the same account, on servers whose slots are run the same way, and take turns round by round. The adapters are random
and small: what they cost does not depend on what they say.

`cache-aware` is the rule of vllm-router (src/policies/cache_aware.rs) on the run's prompts: the server that has most of
the prompt, if that is more than half; else the one that was sent least text; the shorter queue once the queues differ
by more than 32. It knows no adapters.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from pathlib import Path

import anyio
from harness import Samples, arguments, clocked, machine, paired_rounds, spread
from random_adapters import random_variants

from metier.agents import Ask, Message
from metier.router.placement.placement import PlacedAsk, Placement, PlacementCosts, ReplicaState, place
from metier.runtime.meters.percentiles import percentile
from metier.runtime.remote.fleet import Fleet
from metier.runtime.settings.fleet import FleetServer, FleetSettings
from metier.specializers.shelf.base_model import find_base
from metier.specializers.shelf.variant import Variant

sys.path.insert(0, str(Path(__file__).parents[1]))

Rule = Callable[[PlacedAsk, Sequence[ReplicaState], PlacementCosts], Placement]
Variants = dict[str, tuple[Variant, Path]]
KINDS = 4
SLOTS = 2
NAMES = [f"{role}{kind}" for kind in range(KINDS) for role in ("planner", "solver")]
CLOCK_TICKS_S = 1 / os.sysconf("SC_CLK_TCK")


def round_robin() -> Rule:
    """One after the other."""
    turns = count()
    return lambda ask, replicas, costs: _to(replicas[next(turns) % len(replicas)], "its turn")


def least_loaded() -> Rule:
    """The one with the fewest tokens still to compute."""
    return lambda ask, replicas, costs: _to(min(replicas, key=lambda r: (r.outstanding_tokens, r.name)), "least loaded")


def cache_aware(threshold: float = 0.5, imbalance: int = 32) -> Rule:
    """vllm-router's rule; the prompts of a run are each the beginning of the next."""
    sent: dict[str, dict[str, int]] = {}

    def choose(ask: PlacedAsk, replicas: Sequence[ReplicaState], costs: PlacementCosts) -> Placement:
        run = ask.conversation.partition("/")[0]
        loads = {replica.name: sum(replica.adapters.values()) for replica in replicas}
        matches = {replica.name: sent.setdefault(replica.name, {}).get(run, 0) for replica in replicas}
        if max(loads.values()) - min(loads.values()) > imbalance:
            name = min(loads, key=lambda name: loads[name])
        elif max(matches.values()) > threshold * ask.prompt_tokens:
            name = max(matches, key=lambda name: matches[name])
        else:
            name = min(matches, key=lambda name: sum(sent[name].values()))
        sent[name][run] = max(matches[name], ask.prompt_tokens)
        return Placement(name, "cache-aware", 0.0)

    return choose


def _to(replica: ReplicaState, reason: str) -> Placement:
    return Placement(replica.name, reason, 0.0)


RULES: dict[str, Callable[[], Rule]] = {
    "predicted finish": lambda: place,
    "round robin": round_robin,
    "least loaded": least_loaded,
    "cache-aware": cache_aware,
}


async def run_programs(fleet: Fleet, label: str, options: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of each ask, and of all programs."""
    chance = random.Random(label.split()[0])  # the same programs for every rule of a round
    kinds = chance.choices(range(KINDS), [1 / (kind + 1) for kind in range(KINDS)], k=options.programs)
    waiting = list(enumerate(kinds))
    seconds: list[float] = []

    async def work() -> None:
        while waiting:
            number, kind = waiting.pop(0)
            text = f"{label}, brief {number}. " + "Describe a bridge over a river, its builders and its traffic. " * 4
            for step in range(4):
                role = ("planner", "solver")[step % 2]
                began_s = anyio.current_time()
                reply = await fleet.reply(
                    Ask(
                        run_id=f"{label} {number}",
                        step_path=f"step{step}",
                        role=role,
                        messages=(Message(role="user", content=text),),
                        variant=f"{role}{kind}",
                        max_tokens=options.tokens,
                        remaining_s=4.0 - step,
                    )
                )
                seconds.append(anyio.current_time() - began_s)
                text += f" Then: {reply.text}"

    began_s = anyio.current_time()
    async with anyio.create_task_group() as workers:
        for _ in range(options.concurrency):
            workers.start_soon(work)
    return seconds, anyio.current_time() - began_s


@dataclass(frozen=True)
class Round:
    """What a round came to under one rule; p50 and p95 are of its asks."""

    loads: int
    p50_s: float
    p95_s: float
    wall_s: float
    cpu_s: float
    asks: int


async def measure(urls: list[str], groups: list[int], variants: Variants, options: argparse.Namespace) -> None:
    """Paired rounds; the first warms the servers up and is not counted. CPU seconds are the servers' and ours."""
    samples: Samples[str, Round] = Samples(list(RULES), options.journal)
    for number, rule in paired_rounds(list(RULES), options.rounds):
        servers = tuple(FleetServer(url=url) for url in urls)
        settings = FleetSettings(servers=servers, adapter_slots=SLOTS)
        async with Fleet(settings, variants.__getitem__, place=RULES[rule]()) as fleet:
            await fleet.warm()
            await _empty(fleet, variants)
            with clocked(lambda: _cpu_s(groups) + time.process_time()) as spent:
                seconds, wall_s = await run_programs(fleet, f"round{number} {rule}", options)
            loads = sum(total["adapter_loads"] for total in fleet.totals().values())
        p50_s, p95_s = (percentile(seconds, share) for share in (0.5, 0.95))
        took = samples.keep(number, rule, Round(loads, p50_s, p95_s, wall_s, spent.cpu_s, len(seconds)))
        print(f"round {number} {rule}: {took}", flush=True)
    report(samples, options)


async def _empty(fleet: Fleet, variants: Variants) -> None:
    """Take every adapter out, so that each rule begins with empty slots."""
    for member in fleet._members.values():
        for variant, _ in variants.values():
            await member.remote.unload(variant.id)
        member.remote.forget()


def _cpu_s(groups: list[int]) -> float:
    """CPU seconds of the servers' process groups so far."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) in groups:
            total += (int(fields[11]) + int(fields[12])) * CLOCK_TICKS_S
    return total


def report(samples: Samples[str, Round], options: argparse.Namespace) -> None:
    """Medians and spreads over the rounds, and the paired ratio of the slow asks."""
    print(f"\n{machine()}\n{options.programs} programs of 4 asks, {options.concurrency} at a time,", end=" ")
    print(f"{options.rounds} paired rounds")
    for rule in RULES:
        ratios = samples.ratios(rule, "predicted finish", lambda took: took.p95_s)
        names = ("loads", "p50_s", "p95_s", "wall_s", "cpu_s")
        shown = "; ".join(f"{n} {spread(samples.values(rule, attrgetter(n)))}" for n in names)
        print(f"{rule:17} {shown}; p95 ÷ ours {spread(ratios)}")


def main() -> None:
    """Parse options, start the servers, and measure."""
    parser = arguments(__doc__, rounds=5, base=True)
    parser.add_argument("--programs", type=int, default=16, help="programs in a round")
    parser.add_argument("--concurrency", type=int, default=8, help="programs at a time")
    parser.add_argument("--tokens", type=int, default=12, help="tokens an ask writes")
    options = parser.parse_args()
    from tests.runtime.remote.stock_servers import stock_servers

    weights = find_base(options.base)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variants = random_variants(folder, weights, NAMES, rank=8)
        with stock_servers(weights, folder, 2, kv_cache_mib=256) as servers:
            groups = [server.process.pid for server in servers]
            anyio.run(measure, [server.url for server in servers], groups, variants, options)


if __name__ == "__main__":
    main()
