"""One example on four engines: embedded, supervised, two vLLM servers, and two replicas on Ray Serve.

    python benchmarks/four_engines.py --rounds 5

`examples/solve_and_check.py` with its trained adapters, the file unchanged; only `engine` differs. The first two
compute on both cores, each server and each replica on one. One engine is alive at a time; starting it is measured
apart, and a first small batch is not measured. Every round has puzzles of its own, the same on all engines. vLLM's own
servers find our plugin because it is installed beside them. CPU-seconds are those of every process that belongs to the
engine, and of the driver.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
from harness import append_row, arguments, clocked, machine, print_table, spread, tree_cpu_s

from metier.agents.graphs.workflow_file import load_workflow
from metier.agents.tasksets import TaskSet
from metier.runtime import open_session
from metier.runtime.settings.session import load_settings
from metier.specializers.shelf.base_model import find_base

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
EXAMPLE = ROOT / "examples/solve_and_check.py"
ENGINES = ("embedded", "supervised", "two vLLM servers", "ray, two replicas")
KV_CACHE_MIB = 512
"""Of an engine on both cores; two engines have half of it each."""
WARM_UP_RUNS = 4


@contextmanager
def form_of(engine: str, base: Path, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What `open_session` is given for an engine, and the settings; servers live as long as the block."""
    halves = {"engine.threads": 1, "engine.kv_cache_mib": KV_CACHE_MIB // 2}
    if engine == ENGINES[2]:
        from tests.runtime.remote.stock_servers import stock_servers

        sizes = {"kv_cache_mib": KV_CACHE_MIB // 2, "rank": 16, "adapter_slots": 4, "context_tokens": 2048}
        with stock_servers(base, folder, 2, compiled=True, **sizes) as servers:
            yield ",".join(server.url for server in servers), {}
    elif engine == ENGINES[3]:
        yield "ray", {"ray.replicas": 2, **halves}
    else:
        yield engine, {"engine.kv_cache_mib": KV_CACHE_MIB}


async def batch(session: Any, graph: Any, tasks: TaskSet, concurrency: int) -> dict[str, Any]:
    """Run tasks and say what they took."""
    with clocked(tree_cpu_s) as spent:
        results = await session.map(graph, [task.input for task in tasks], concurrency=concurrency)
    outputs = [None if result.error else result.output for result in results]
    return {
        "solved": sum(tasks.score(task, output) == 1.0 for task, output in zip(tasks, outputs, strict=True)),
        "programs_per_min": 60 * len(tasks) / spent.wall_s,
        "cpu_s_per_program": spent.cpu_s / len(tasks),
        "answers": [None if output is None else output.model_dump(mode="json") for output in outputs],
    }


async def measure(engine: str, rounds: int, runs: int, concurrency: int) -> list[dict[str, Any]]:
    """All rounds of one engine."""
    file, base, rows = load_workflow(str(EXAMPLE)), find_base("smollm2-135m"), []
    with tempfile.TemporaryDirectory() as folder, form_of(engine, base, Path(folder)) as (form, overrides):
        settings = load_settings(overrides={**overrides, "shelf": str(ROOT / "examples/variants")})
        began_s = time.monotonic()
        assignment = ROOT / "examples/assignment.yaml"
        async with open_session(
            base="smollm2-135m", assignment=assignment, engine=form, store=":memory:", settings=settings
        ) as session:
            await batch(session, file.graph, file.tasks(f"test:{WARM_UP_RUNS}:99"), concurrency)
            ready_s = time.monotonic() - began_s
            for number in range(1, rounds + 1):
                row = await batch(session, file.graph, file.tasks(f"test:{runs}:{100 + number}"), concurrency)
                row |= {"engine": engine, "round": number, "ready_s": ready_s}
                rows.append(row)
                print(f"{engine} {number}: {row['programs_per_min']:.1f} programs/min", flush=True)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Medians and spreads, and how many answers are those of the embedded engine."""
    first = [row for row in rows if row["engine"] == ENGINES[0]]
    lines = []
    for engine in ENGINES:
        mine = [row for row in rows if row["engine"] == engine]
        if not mine:
            continue
        # Engines that were measured without the embedded one have nothing to be compared with.
        pairs = list(zip(mine, first, strict=True)) if first else []
        ratios = [a["programs_per_min"] / b["programs_per_min"] for a, b in pairs]
        same = [a == b for mine_row, row in pairs for a, b in zip(mine_row["answers"], row["answers"], strict=True)]
        answers = sum(len(row["answers"]) for row in mine)
        lines.append(
            (
                engine,
                spread([row["programs_per_min"] for row in mine], ".1f"),
                spread(ratios),
                spread([row["cpu_s_per_program"] for row in mine]),
                f"{sum(row['solved'] for row in mine)} of {answers}",
                f"{sum(same)} of {len(same)}",
                f"{mine[0]['ready_s']:.0f}",
            )
        )
    heads = ("engine", "programs/min", "÷ embedded", "CPU-s a program", "solved", "answers as embedded")
    print(machine())
    print_table((*heads, "ready after s"), lines)


def main() -> None:
    """Measure one engine after the other and print the table."""
    parser = arguments(__doc__, rounds=5)
    parser.set_defaults(journal=Path("runs/four_engines.jsonl"))
    parser.add_argument("--runs", type=int, default=24, help="puzzles in a batch")
    parser.add_argument("--concurrency", type=int, default=8, help="puzzles at a time")
    parser.add_argument("--only", nargs="+", default=list(ENGINES), choices=ENGINES, help="engines to measure")
    options = parser.parse_args()
    rows = []
    for engine in options.only:
        rows += anyio.run(measure, engine, options.rounds, options.runs, options.concurrency)
    for row in rows:
        append_row(options.journal, row)
    report(rows)


if __name__ == "__main__":
    main()
