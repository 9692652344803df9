"""What a tool is worth to a small model: trained to use it, trained as long without it, and untrained with it.

    metier make examples/recipes/calculator_team.yaml
    metier make examples/recipes/calculator_team_direct.yaml
    python benchmarks/tool_teams.py calculator_team --measure
    python benchmarks/tool_teams.py calculator_team                # the table of what has been measured

and the same with `ask_database`. Decided before anything was measured: the tasks (`TASKS`, of which no training and no
trying out has seen any), the same for all arms; a process of its own for every arm and block of tasks, its engine
warmed up on tune tasks; the two trained arms have as many rows, steps and trained weights. What is measured stays in
`tool_teams.jsonl` under the content of graph and variant, and is not measured again. Intervals of a share are
Wilson's; those of differences are by bootstrap over tasks, paired. Calls are those that were made, failed ones too.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from harness import append_row, arguments, in_turns, interval, machine, print_table, read_rows, resamples
from measured_run import measured_run

from metier.agents.errors import VariantError
from metier.agents.graphs.workflow_file import load_workflow
from metier.router.assignment import BASE, Assignment, RoleAssignment
from metier.router.probing.journal import record_key
from metier.runtime.settings.session import load_settings
from metier.specializers.shelf.shelf import Shelf

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("tool_teams.jsonl")
TASKS, BLOCKS, BLOCK_TASKS = "test:120:11", 2, 60
THREADS = 1


@dataclass(frozen=True)
class Arm:
    """Who is measured: whether its team has the tool, and the suffix of its variant's name; None is the base."""

    has_tool: bool
    variant: str | None


ARMS = {
    "tool, trained": Arm(True, ""),
    "no tool, trained": Arm(False, "-direct"),
    "tool, untrained": Arm(True, None),
}
TEAMS = ("calculator_team", "ask_database")


def workflow_of(team: str, arm: Arm) -> str:
    """The workflow of an arm, `file.py:graph`."""
    return f"{ROOT / 'examples' / team}.py:{'graph' if arm.has_tool else 'direct'}"


def assignment_of(team: str, arm: Arm) -> Assignment:
    """One variant in all roles."""
    roles = load_workflow(workflow_of(team, arm)).graph.roles()
    variant = BASE if arm.variant is None else team.replace("_", "-") + arm.variant
    return Assignment(roles=dict.fromkeys(roles, RoleAssignment(variant=variant)))


def content_of(team: str, arm: Arm, folders: list[str]) -> str:
    """Content of an arm: graph, variants, tasks. Raises: VariantError when a variant was not made."""
    shelf = Shelf(load_settings().shelf, also=[Path(folder) for folder in folders])
    ids = [shelf.get(name).id for name in sorted(assignment_of(team, arm).variants())]
    return record_key(graph=load_workflow(workflow_of(team, arm)).graph.fingerprint, ids=ids, tasks=TASKS)


async def measure(team: str, name: str, block: int, folders: list[str]) -> dict[str, Any]:
    """Run a block of tasks under one arm in this process; returns its row."""
    arm = ARMS[name]
    row = {"team": team, "arm": name, "content": content_of(team, arm, folders), "block": block, "machine": machine()}
    file, assignment = load_workflow(workflow_of(team, arm)), assignment_of(team, arm)
    places = slice(block * BLOCK_TASKS, (block + 1) * BLOCK_TASKS)
    return row | await measured_run(file, assignment, TASKS, folders, {"engine.threads": THREADS}, places)


def measure_missing(team: str, names: list[str], folders: list[str], results: Path) -> None:
    """Measure every block of every arm whose variant is there, unless it was measured, each in a process of its own."""
    for block in range(BLOCKS):
        for name in in_turns(names, block):
            try:
                content = content_of(team, ARMS[name], folders)
            except VariantError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            if (content, block) not in {(row["content"], row["block"]) for row in read_rows(results)}:
                command = [sys.executable, __file__, team, "--one", name, str(block), "--results", str(results)]
                subprocess.run([*command, *(f"--shelf={folder}" for folder in folders)], check=True)


def arms_of(team: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The arms of a team with the blocks measured so far, added up: the last content of each."""
    found = {}
    for name in ARMS:
        own = [row for row in rows if (row["team"], row["arm"]) == (team, name)]
        blocks = {row["block"]: row for row in own if row["content"] == own[-1]["content"]}
        if blocks:
            found[name] = {
                "runs": [run for number in sorted(blocks) for run in blocks[number]["runs"]],
                **{field: sum(row[field] for row in blocks.values()) for field in ("cpu_s", "wall_s")},
                "others": max(row["others"] for row in blocks.values()),
            }
    return found


def wilson(successes: float, number: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, weight = successes / number, z * z / number
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / number + weight / (4 * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def show(team: str, rows: list[dict[str, Any]]) -> None:
    """Print a team's arms, and how much more the trained arm with the tool solves of the tasks it shares with each."""
    arms = arms_of(team, rows)
    scores = {name: {run["task"]: run["score"] for run in row["runs"]} for name, row in arms.items()}
    heads = ("arm", "tasks", "solved, % (95 %)", "calls a task", "asks a task", "tokens written", "CPU-s a task",
             "s a task", "others")  # fmt: skip
    table = []
    for name, row in arms.items():
        runs, number = row["runs"], len(row["runs"])
        low, high = wilson(sum(scores[name].values()), number)
        means = [sum(run[field] for run in runs) / number for field in ("score", "calls", "asks", "written")]
        table.append((
            name, str(number), f"{100 * means[0]:.1f} ({100 * low:.1f}-{100 * high:.1f})", f"{means[1]:.2f}",
            f"{means[2]:.2f}", f"{means[3]:.1f}", f"{row['cpu_s'] / number:.3f}", f"{row['wall_s'] / number:.2f}",
            f"{row['others']:.0%}",
        ))  # fmt: skip
    print(f"{team}, {TASKS}\n")
    print_table(heads, table)
    first = next(iter(ARMS))
    for name in list(arms)[1:] if first in arms else ():
        shared = [task for task in scores[first] if task in scores[name]]
        gains = np.array([scores[first][task] - scores[name][task] for task in shared])
        low, high = interval(gains[resamples(len(gains))].mean(axis=1))
        print(f"{first} minus {name}: {100 * gains.mean():+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")


def main() -> None:
    """Parse options; without any, print what has been measured."""
    parser = arguments(__doc__)
    parser.add_argument("team", choices=TEAMS)
    parser.add_argument("--measure", action="store_true", help="run what has not been measured (minutes an arm)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--shelf", action="append", default=[], help="folder of variants; may be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "BLOCK"), help="run this arm's block here, nothing else")
    options = parser.parse_args()
    if options.one:
        name, block = options.one
        row = anyio.run(measure, options.team, name, int(block), options.shelf)
        append_row(options.results, row)
        solved = sum(run["score"] for run in row["runs"])
        return print(f"{name}, block {block}: {solved:.0f} of {len(row['runs'])} solved", flush=True)
    if options.measure:
        measure_missing(options.team, options.arms, options.shelf, options.results)
    show(options.team, read_rows(options.results))


if __name__ == "__main__":
    main()
