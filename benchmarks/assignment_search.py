"""How many runs it takes to find an assignment within 1 % of the best: ours, coordinate ascent, chance, agentopt-py.

    python benchmarks/assignment_search.py --record examples/solve_and_check.py --also examples/variants \
        --variants base,planner,solver,critic --tasks tune:50 --table runs/search/table.json
    python benchmarks/assignment_search.py --table runs/search/table.json

`--record` runs every assignment on every task once (resumable; equal asks are asked once) and writes the table. The
second command replays searches on it: 20 shuffles of tasks and candidates, medians. An evaluation is one run of one
task under one assignment, made once however often it is asked for; asks are counted with equal asks of all runs so far
reused, so that shared prefixes of runs cost nothing again. A search is within 1 % when what it ends with scores at
least 0.99 of the best assignment on the whole table; one that ends elsewhere counts as infinitely many evaluations.

agentopt-py (0.1.0, Apache-2.0) is run where it is installed (`pip install agentopt-py`), with its own defaults. Its
`lm_proposal` needs a language model that knows the candidates by name, its `bayesian` botorch: left out without them.
Without --table, a table made by a formula is used, which shows that everything works and measures nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import anyio

from metier.router import Assignment, Candidate, Evaluator, Journal, Outcome, Part, Space
from metier.router.evaluator import OnOutcome
from metier.router.search import SearchSettings, explore, find_best

SHUFFLES = 20
CLOSE = 0.99
Cast = tuple[str, ...]
SYNTHETIC = "synthetic: made by a formula, nothing was measured"


@dataclass
class Table:
    """What every assignment scored on every task, and which asks each run made (equal asks have equal numbers)."""

    name: str
    roles: tuple[str, ...]
    variants: tuple[str, ...]
    tasks: tuple[str, ...]
    scores: dict[Cast, list[float]]
    asks: dict[Cast, list[list[int]]]

    @property
    def casts(self) -> list[Cast]:
        """Every assignment."""
        return list(itertools.product(self.variants, repeat=len(self.roles)))

    def mean(self, cast: Cast) -> float:
        """Score of an assignment over the whole table."""
        return sum(self.scores[cast]) / len(self.tasks)

    @property
    def best(self) -> float:
        """Score of the best assignment."""
        return max(map(self.mean, self.casts))

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "name": self.name, "roles": self.roles, "variants": self.variants, "tasks": self.tasks,
            "runs": [{"cast": c, "scores": self.scores[c], "asks": self.asks[c]} for c in self.casts],
        }  # fmt: skip
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read what `write` has written."""
        record = json.loads(path.read_text(encoding="utf-8"))
        runs = {tuple(run["cast"]): run for run in record["runs"]}
        return cls(
            record["name"],
            tuple(record["roles"]),
            tuple(record["variants"]),
            tuple(record["tasks"]),
            {cast: run["scores"] for cast, run in runs.items()},
            {cast: run["asks"] for cast, run in runs.items()},
        )


def synthetic_table(seed: int = 0, tasks: int = 50, best: tuple[float, float] = (0.85, 0.97)) -> Table:
    """Three roles in a row, four candidates each, by formula: a task is solved when all three roles manage it.

    Each candidate manages a random share of tasks, its own role's favourite most of them; hard tasks are hard for all.
    """
    rng = random.Random(seed)
    roles, variants = ("planner", "solver", "critic"), ("base", "planner", "solver", "critic")
    skill = {(r, v): rng.uniform(*best) if r == v else rng.uniform(0.05, 0.85) for r in roles for v in variants}
    hardness = [rng.random() for _ in range(tasks)]
    able = {
        (r, v): [0.6 * hardness[t] + 0.4 * rng.random() < skill[r, v] for t in range(tasks)]
        for r in roles
        for v in variants
    }
    numbers: dict[tuple[Any, ...], int] = {}
    scores, asks = {}, {}
    for cast in itertools.product(variants, repeat=3):
        scores[cast] = [float(all(able[r, v][t] for r, v in zip(roles, cast, strict=True))) for t in range(tasks)]
        asks[cast] = [
            [
                # What a role is asked depends on whether those before it were right.
                numbers.setdefault((t, i, cast[i], *(able[roles[j], cast[j]][t] for j in range(i))), len(numbers))
                for i in range(3)
            ]
            for t in range(tasks)
        ]
    return Table(SYNTHETIC, roles, variants, tuple(map(str, range(tasks))), scores, asks)


@dataclass
class Meter:
    """Counts evaluations of a table, and asks with equal ones reused."""

    table: Table
    seen: set[tuple[Cast, int]] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)

    def score(self, cast: Cast, task: int) -> float:
        """The score of one run, counted when it is new."""
        self.seen.add((cast, task))
        self.asked.update(self.table.asks[cast][task])
        return self.table.scores[cast][task]


Method = Callable[[Table, Meter, int], Cast]


def ours(table: Table, meter: Meter, seed: int) -> Cast:
    """`explore` and `find_best`, as `metier probe` without an incumbent; one task at a time."""
    rng = random.Random(seed)
    parts = tuple(Part(role) for role in table.roles)
    variants = [Candidate(v) for v in rng.sample(table.variants, len(table.variants))]
    space = Space(parts, {part: tuple(variants) for part in parts}, dict.fromkeys(table.roles, 1))
    order = {table.tasks[i]: i for i in rng.sample(range(len(table.tasks)), len(table.tasks))}

    async def run(assignment: Assignment, tasks: Sequence[str], on_outcome: OnOutcome) -> None:
        cast = tuple(assignment.roles[role].variant for role in table.roles)
        for task in tasks:
            on_outcome(Outcome(key="", task=task, score=meter.score(cast, order[task])))

    async def search() -> Cast:
        evaluator = Evaluator(space, {task: task for task in order}, run, Journal(None, Outcome))
        settings = SearchSettings(seed=seed)
        start = await explore(space, list(order), evaluator.scores, settings)
        best = await find_best(space, list(order), evaluator.scores, start, settings)
        return tuple(best[part].variant for part in parts)

    return anyio.run(search)


def coordinate_ascent(table: Table, meter: Meter, seed: int) -> Cast:
    """One role after the other: each candidate on every task, the best stays; until nothing changes."""
    rng = random.Random(seed)
    best = tuple(rng.choice(table.variants) for _ in table.roles)

    def mean(cast: Cast) -> float:
        return sum(meter.score(cast, task) for task in range(len(table.tasks)))

    while True:
        before = best
        for place in rng.sample(range(len(table.roles)), len(table.roles)):
            tried = [(*best[:place], v, *best[place + 1 :]) for v in table.variants]
            best = max(tried, key=lambda cast: (mean(cast), cast == best))
        if best == before:
            return best


def chance(table: Table, meter: Meter, seed: int) -> Cast:
    """Random assignments on every task, stopped by an oracle once one is within 1 %: a bound no real one reaches."""
    casts = table.casts
    random.Random(seed).shuffle(casts)
    for cast in casts:
        for task in range(len(table.tasks)):
            meter.score(cast, task)
        if table.mean(cast) >= CLOSE * table.best:
            return cast
    raise AssertionError("unreachable: the best assignment is among them")


def brute_force(table: Table, meter: Meter, seed: int) -> Cast:
    """Every assignment on every task."""
    return max(table.casts, key=lambda cast: sum(meter.score(cast, task) for task in range(len(table.tasks))))


def agentopt(selector: str) -> Method:
    """One of agentopt-py's selectors at its defaults; its agent looks runs up in the table."""

    def select(table: Table, meter: Meter, seed: int) -> Cast:
        from agentopt import LLMTracker, ModelSelector  # type: ignore[import-not-found]

        class Agent:
            def __init__(self, models: dict[str, str]) -> None:
                self.cast = tuple(models[role] for role in table.roles)

            def run(self, task: int) -> float:
                return meter.score(self.cast, task)

        rng = random.Random(seed)
        random.seed(seed)
        tasks = rng.sample(range(len(table.tasks)), len(table.tasks))
        variants = rng.sample(table.variants, len(table.variants))
        options = {"seed": seed} if selector in ("random", "hill_climbing") else {}
        with contextlib.redirect_stdout(io.StringIO()):
            found = ModelSelector(
                agent=Agent,
                models={role: list(variants) for role in table.roles},
                eval_fn=lambda expected, actual: actual,
                dataset=[(task, task) for task in tasks],
                method=selector,
                tracker=LLMTracker(cache=False),  # nothing goes over the wire, and it would leave files behind
                **options,
            ).select_best()
        best = found.get_best_combo()
        return tuple(best[role] for role in table.roles)

    return select


AGENTOPT = (
    "brute_force",
    "random",
    "hill_climbing",
    "arm_elimination",
    "epsilon_lucb",
    "threshold",
    "lm_proposal",
    "bayesian",
)
METHODS: dict[str, Method] = {
    "ours": ours,
    "coordinate ascent": coordinate_ascent,
    "random, stopped by an oracle": chance,
    "brute force": brute_force,
    **{f"agentopt {selector}": agentopt(selector) for selector in AGENTOPT},
}


@dataclass(frozen=True)
class Row:
    """One method over all shuffles."""

    method: str
    evaluations: float
    spread: tuple[float, float]
    asks: float
    hits: int
    counting_misses: float
    note: str = ""


def study(table: Table, methods: Sequence[str], shuffles: int = SHUFFLES) -> list[Row]:
    """Medians over shuffles; a method that cannot run here says why."""
    rows = []
    for name in methods:
        spent, asked, within = [], [], []
        try:
            for seed in range(shuffles):
                meter = Meter(table)
                cast = METHODS[name](table, meter, seed)
                spent.append(len(meter.seen))
                asked.append(len(meter.asked))
                within.append(table.mean(cast) >= CLOSE * table.best - 1e-12)
        except Exception as error:  # a stranger's code: whatever keeps it from running goes into its row
            rows.append(
                Row(name, math.nan, (math.nan, math.nan), math.nan, 0, math.nan, f"{type(error).__name__}: {error}")
            )
            continue
        counted = [n if hit else math.inf for n, hit in zip(spent, within, strict=True)]
        rows.append(Row(name, median(spent), (min(spent), max(spent)), median(asked), sum(within), median(counted)))
    return rows


def show(table: Table, rows: Sequence[Row], shuffles: int) -> str:
    """The study as Markdown."""
    lines = [
        f"Table: {table.name}; {len(table.casts)} assignments x {len(table.tasks)} tasks, best {table.best:.3f}.",
        "",
        f"| method | evaluations at its end, median (range) of {shuffles} | asks, equal ones once | within 1 % | "
        "median, misses infinite |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if math.isnan(row.evaluations):
            lines.append(f"| {row.method} | {row.note[:90]} | – | – | – |")
            continue
        low, high = row.spread
        counted = "infinite" if math.isinf(row.counting_misses) else f"{row.counting_misses:.0f}"
        spent = f"{row.evaluations:.0f} ({low:.0f}-{high:.0f})"
        lines.append(f"| {row.method} | {spent} | {row.asks:.0f} | {row.hits} of {shuffles} | {counted} |")
    return "\n".join(lines) + "\n"


async def record(arguments: argparse.Namespace) -> Table:
    """Run every assignment of a workflow on every task, through real engines, and note what each run asked."""
    from metier.runtime.probing import ProbeOptions, absolute, open_bench, read_variants

    options = ProbeOptions(
        workflow=absolute(arguments.record),
        tasks=arguments.tasks,
        variants=read_variants([arguments.variants]),
        split_rounds=False,
        also=tuple(arguments.also),
        engine=arguments.engine,
        concurrency=arguments.concurrency,
    )
    folder = arguments.table.parent
    async with open_bench(options, folder) as bench:
        tasks = bench.file.tasks(options.tasks)
        ids = [task.id for task in tasks]
        evaluator = bench.evaluator(tasks)
        roles = tuple(part.role for part in bench.space.parts)
        scores: dict[Cast, list[float]] = {}
        asks: dict[Cast, list[list[int]]] = {}
        numbers: dict[str, int] = {}
        for cast in itertools.product(options.variants, repeat=len(roles)):
            choices = {part: Candidate.read(name) for part, name in zip(bench.space.parts, cast, strict=True)}
            outcomes = await evaluator.outcomes(choices, ids)
            scores[cast] = [outcome.score for outcome in outcomes]
            asks[cast] = [
                [numbers.setdefault(ask.content, len(numbers)) for ask in outcome.asks] for outcome in outcomes
            ]
            made = evaluator.counts
            print(
                f"{cast}: {sum(scores[cast]):.0f} of {len(ids)}; {made.asks} asks, {made.asks_reused} reused",
                flush=True,
            )
    name = f"recorded from {Path(options.workflow).name}, {options.tasks}, engine {options.engine}"
    return Table(name, roles, options.variants, tuple(ids), scores, asks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="recorded table (JSON)")
    parser.add_argument("--record", metavar="WORKFLOW", help="run this workflow and write the table first")
    parser.add_argument("--variants", default="base,planner,solver,critic")
    parser.add_argument("--tasks", default="tune:50")
    parser.add_argument("--also", action="append", default=[], help="folder of variants")
    parser.add_argument("--engine", default="embedded", choices=("embedded", "supervised", "scripted"))
    parser.add_argument("--concurrency", type=int, default=None)
    parser.add_argument("--shuffles", type=int, default=SHUFFLES)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.record:
        arguments.table = arguments.table or Path("runs/search/table.json")
        asyncio.run(record(arguments)).write(arguments.table)
    table = Table.read(arguments.table) if arguments.table else synthetic_table()
    rows = study(table, arguments.methods.split(","), arguments.shuffles)
    print(show(table, rows, arguments.shuffles))


if __name__ == "__main__":
    main()
