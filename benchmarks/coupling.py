"""What it is worth to know that parts share engines and slots: the same solver with and without, both measured.

    metier probe examples/ledger.py … --out runs/probe_ledger --set engine.threads=1
    python benchmarks/coupling.py runs/probe_ledger --memory-mib 1700      # where memory binds
    python benchmarks/coupling.py runs/probe_ledger --adapter-slots 1      # where slots bind

Without coupling every part pays for an engine of its own and nothing for swaps, each with the cost it was measured
with. Both choices minimise CPU-seconds and may lose as much quality. Each then runs on fresh engines in a process of
its own, in turns over blocks of fresh tasks; ratios are paired by bootstrap over tasks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anyio
from cost_of_pass import Arm, show
from harness import arguments, in_turns
from measured_run import measured_run

from metier.agents.errors import InfeasibleError
from metier.agents.graphs.workflow_file import load_workflow
from metier.router.assignment import load_assignment
from metier.router.probing.profile import read_profiles
from metier.router.solving.coupling import Problem, make_problem, predict
from metier.router.solving.limits import Limits
from metier.router.solving.solve import solve
from metier.runtime.trials.probe_options import read_options
from metier.runtime.trials.run_assign import serving_of
from metier.runtime.trials.run_probe import PROFILES, Trials, open_trials

TASKS, BLOCK_TASKS, QUALITY_LOSS = "test:200:8", 100, 0.02
COUPLED, UNCOUPLED = "coupled", "uncoupled"


async def choices(folder: Path, limits: Limits, overrides: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """What each solver chooses; writes the assignments to `out` and returns a record for each."""
    options = read_options(folder)
    options = options.model_copy(update={"overrides": {**options.overrides, **overrides}})
    async with open_trials(options, folder) as trials:
        problem = make_problem(read_profiles(folder / PROFILES), trials.space.parts, serving=serving_of(trials))
        limits = limits.model_copy(update={"min_quality": max(problem.quality - QUALITY_LOSS, 0.0)})
        return [choose(trials, problem, name, limits, out) for name in (COUPLED, UNCOUPLED)]


def choose(trials: Trials, problem: Problem, name: str, limits: Limits, out: Path) -> dict[str, Any]:
    """One solver's choice, with what it thinks of it and what the coupled model does."""
    try:
        solution = solve(replace(problem, coupled=name == COUPLED), limits)
    except InfeasibleError as error:
        return {"solver": name, "refused": str(error)}
    (out / f"{name}.yaml").write_text(trials.space.assignment(solution.choices).to_yaml(), encoding="utf-8")
    return {
        "solver": name,
        "choices": {str(part): str(candidate) for part, candidate in solution.choices.items()},
        "predicted": asdict(solution.prediction),
        "predicted_coupled": asdict(predict(problem, solution.choices)),
    }


async def run_block(folder: Path, assignment: Path, block: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Run one block of fresh tasks under an assignment file, in this process."""
    options = read_options(folder)
    places = slice(block * BLOCK_TASKS, (block + 1) * BLOCK_TASKS)
    settings = {**options.overrides, **overrides}
    return await measured_run(
        load_workflow(options.workflow), load_assignment(assignment), TASKS, options.shelf, settings, places
    )


def main() -> None:
    """Choose, run, print."""
    parser = arguments(__doc__)
    parser.add_argument("probe", type=Path, help="folder of `metier probe`")
    parser.add_argument("--memory-mib", type=float, help="most memory of all engines together")
    parser.add_argument("--adapter-slots", type=int, help="adapters resident at once")
    parser.add_argument("--no-measure", action="store_true", help="print what is chosen and stop")
    parser.add_argument("--one", nargs=2, metavar=("ASSIGNMENT", "BLOCK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    overrides = {} if options.adapter_slots is None else {"engine.adapter_slots": options.adapter_slots}
    if options.one:
        row = anyio.run(run_block, options.probe, Path(options.one[0]), int(options.one[1]), overrides)
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as place:
        limits = Limits(memory_mib=options.memory_mib)
        chosen = anyio.run(choices, options.probe, limits, overrides, Path(place))
        for record in chosen:
            print(json.dumps(record), flush=True)
        if options.no_measure or any("refused" in record for record in chosen):
            return
        if chosen[0]["choices"] == chosen[1]["choices"]:
            return print("both choose the same: here coupling changes nothing")
        blocks: dict[str, list[dict[str, Any]]] = {COUPLED: [], UNCOUPLED: []}
        for block in range(int(TASKS.split(":")[1]) // BLOCK_TASKS):
            for name in in_turns((COUPLED, UNCOUPLED), block):
                command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{place}/{name}.yaml", str(block)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                blocks[name].append(json.loads(done.stdout.splitlines()[-1]))
    arms = [Arm.of(f"assigned, {name}", rows) for name, rows in blocks.items()]
    print(show("coupled and uncoupled", arms, against=(f"assigned, {UNCOUPLED}",)))
    for name, rows in blocks.items():
        swaps = sum(run["swaps"] for row in rows for run in row["runs"])
        memory = max(row["engines_mib"] for row in rows)
        print(f"{name}: {swaps} swaps, {memory} MiB for its engines, {sum(row['wall_s'] for row in rows):.1f} s")


if __name__ == "__main__":
    main()
