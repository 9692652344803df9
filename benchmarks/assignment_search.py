"""How many runs it takes to find an assignment within 1 % of the best: ours, coordinate ascent, chance, agentopt-py.

    python benchmarks/assignment_search.py --record examples/solve_and_check.py --shelf examples/variants \
        --variants base,planner,solver,critic --tasks tune:50 --table runs/search/table.json
    python benchmarks/assignment_search.py --table runs/search/table.json --agentopt-python ENVIRONMENT/bin/python

`--record` runs every assignment on every task once (resumable; equal asks are asked once) and writes the table. The
second command replays searches on it: 20 shuffles of tasks and candidates, medians. An evaluation is one run of one
task under one assignment, made once however often it is asked for; asks are counted with equal asks of all runs so far
reused, so that shared prefixes of runs cost nothing again. A search is within 1 % when what it ends with scores at
least 0.99 of the best assignment on the whole table; one that ends elsewhere counts as infinitely many evaluations.

agentopt-py is run by the Python of an environment that has it (`pip install agentopt-py`). Without --table, tables made
by a formula are used, which show that everything works and measure nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import harness
from agentopt_search import SELECTORS
from outcome_table import Cast, Meter, Table, synthetic_table
from search_methods import CLOSE, METHODS

from metier.router import Candidate

SHUFFLES = 20
AGENTOPT = "agentopt "
NAMES = (*METHODS, *(AGENTOPT + selector for selector in SELECTORS))
Ended = tuple[Cast, int, int]
"""Where a search ended, after how many evaluations, and how many asks those made."""


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


def study(table: Table, methods: Sequence[str], shuffles: int = SHUFFLES, agentopt: str = sys.executable) -> list[Row]:
    """Medians over shuffles; a method that cannot run here says why. `agentopt` is a Python that has agentopt-py."""
    rows = []
    for name in methods:
        try:
            if name.startswith(AGENTOPT):
                ended = list(_agentopt(table, name.removeprefix(AGENTOPT), shuffles, agentopt))
            else:
                ended = list(_ours(table, name, shuffles))
        except RuntimeError as error:
            rows.append(Row(name, math.nan, (math.nan, math.nan), math.nan, 0, math.nan, str(error)))
            continue
        spent = [evaluations for _, evaluations, _ in ended]
        within = [table.mean(cast) >= CLOSE * table.best - 1e-12 for cast, _, _ in ended]
        counted = [n if hit else math.inf for n, hit in zip(spent, within, strict=True)]
        asks = median(asks for _, _, asks in ended)
        rows.append(Row(name, median(spent), (min(spent), max(spent)), asks, sum(within), median(counted)))
    return rows


def _ours(table: Table, name: str, shuffles: int) -> Iterator[Ended]:
    for seed in range(shuffles):
        meter = Meter(table)
        cast = METHODS[name](table, meter, seed)
        yield cast, len(meter.seen), len(meter.asked)


def _agentopt(table: Table, selector: str, shuffles: int, python: str) -> Iterator[Ended]:
    """Run a selector of agentopt-py; raises RuntimeError with its own last line when it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        table.write(path)
        script = Path(__file__).with_name("agentopt_search.py")
        command = [python, str(script), str(path), selector, str(shuffles)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word why"])[-1])
    for line in done.stdout.splitlines():
        row = json.loads(line)
        yield tuple(row["cast"]), row["evaluations"], row["asks"]


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
    from metier.runtime.cli.options import absolute, comma_separated
    from metier.runtime.trials.probe_options import ProbeOptions
    from metier.runtime.trials.run_probe import open_trials

    options = ProbeOptions(
        workflow=absolute(arguments.record),
        tasks=arguments.tasks,
        variants=comma_separated([arguments.variants]),
        split_rounds=False,
        shelf=tuple(arguments.shelf),
        engine=arguments.engine,
        concurrency=arguments.concurrency,
    )
    folder = arguments.table.parent
    async with open_trials(options, folder) as trials:
        tasks = trials.file.tasks(options.tasks)
        ids = [task.id for task in tasks]
        evaluator = trials.evaluator(tasks)
        roles = tuple(part.role for part in trials.space.parts)
        scores: dict[Cast, list[float]] = {}
        asks: dict[Cast, list[list[int]]] = {}
        numbers: dict[str, int] = {}
        for cast in itertools.product(options.variants, repeat=len(roles)):
            choices = {part: Candidate.read(name) for part, name in zip(trials.space.parts, cast, strict=True)}
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
    """Record a table where asked to, and replay the searches on it."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--table", type=Path, help="recorded table (JSON)")
    parser.add_argument("--record", metavar="WORKFLOW", help="run this workflow and write the table first")
    parser.add_argument("--variants", default="base,planner,solver,critic")
    parser.add_argument("--tasks", default="tune:50")
    parser.add_argument("--shelf", action="append", default=[], help="folder of variants")
    parser.add_argument("--engine", default="embedded", choices=("embedded", "supervised", "scripted"))
    parser.add_argument("--concurrency", type=int, default=None)
    parser.add_argument("--shuffles", type=int, default=SHUFFLES)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES), metavar="METHOD")
    parser.add_argument("--agentopt-python", default=sys.executable, help="a Python that has agentopt-py")
    parser.add_argument("--seeds", type=int, default=1, help="how many tables made by a formula")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.record:
        arguments.table = arguments.table or Path("runs/search/table.json")
        asyncio.run(record(arguments)).write(arguments.table)
    tables = [Table.read(arguments.table)] if arguments.table else map(synthetic_table, range(arguments.seeds))
    for table in tables:
        rows = study(table, arguments.methods, arguments.shuffles, arguments.agentopt_python)
        print(show(table, rows, arguments.shuffles), flush=True)


if __name__ == "__main__":
    main()
