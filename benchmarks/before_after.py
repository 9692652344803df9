"""What assigning buys on a workflow: the base by prompt alone, one adapter for all roles, by hand, assigned.

    python benchmarks/before_after.py solve_and_check                 # the table of what has been measured
    python benchmarks/before_after.py solve_and_check --tune-single --shelf runs/shelf
    python benchmarks/before_after.py solve_and_check --measure --shelf examples/variants --shelf runs/shelf

Decided before anything was measured: the tasks (`TASKS`, a seed that nothing else uses), in blocks; a process of its
own for every arm and block, arms taking turns within a block, so that a busy hour falls on all of them alike; engines
are started and warmed up on tune tasks before the clock runs. Cost is the CPU-seconds of the whole process while the
block runs (engine, grammar, executor), shared out over its tasks as the engine's meter says. Cost of pass is that per
solved task; an arm that solves nothing has none. Intervals are by bootstrap over tasks, paired between arms.

The assigned file (`examples/NAME_assigned.yaml`) is what `metier assign` wrote. "assigned, equal thinking" gives each
of its variants the single adapter's budget, which shows what of the gain is not a matter of thinking less. That budget
is the smallest within `MARGIN` of the best on tune tasks: `--tune-single` measures it, `STUDIES` names it. What is
measured is kept in `before_after.jsonl` under the content of arm and variants, and not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from cost_of_pass import Arm, show
from harness import append_row, arguments, in_turns, read_rows
from measured_run import measured_run

from metier.agents.errors import VariantError
from metier.agents.graphs.workflow_file import load_workflow
from metier.router.assignment import BASE, Assignment, RoleAssignment, load_assignment
from metier.router.probing.journal import record_key
from metier.runtime.settings.session import load_settings
from metier.specializers.shelf.shelf import Shelf

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("before_after.jsonl")
TASKS, BLOCK_TASKS = "test:300:7", 100
TUNE_TASKS, BUDGETS, MARGIN = "tune:100:5", (0, 16, 32, 48), 0.02
THREADS = 1
"""Two threads spin for each other whenever something else has their core; CPU-seconds would then measure that."""


@dataclass(frozen=True)
class Study:
    """One workflow: its assignment by hand, the adapter trained on all roles, and the budget that suits it on tune.

    `shelf_single` is the best of the roles' own variants when it plays every role, by the probe on tune tasks;
    `budgets` are those the single adapter is tried with, in tokens.
    """

    by_hand: str
    single: str
    single_thinking_tokens: int | None = None
    shelf_single: str | None = None
    budgets: tuple[int, ...] = BUDGETS


STUDIES = {
    "solve_and_check": Study("assignment.yaml", "puzzles-single"),
    "ledger": Study("ledger_assignment.yaml", "ledger-single", single_thinking_tokens=48),
    "gift_card": Study(
        "gift_card_assignment.yaml", "gift-card-single", single_thinking_tokens=64, budgets=(0, 32, 64, 96)
    ),
}
FEW_SHOT, SINGLE, SHELF_SINGLE, BY_HAND, ASSIGNED, EQUAL = (
    "base, few-shot",
    "one adapter for all roles",
    "best role's variant in all roles",
    "by hand",
    "assigned",
    "assigned, equal thinking",
)
ARMS = (FEW_SHOT, SINGLE, SHELF_SINGLE, BY_HAND, ASSIGNED, EQUAL)


def workflow_of(name: str, arm: str) -> Path:
    """The workflow file that an arm runs."""
    return ROOT / "examples" / (f"{name}_few_shot.py" if arm == FEW_SHOT else f"{name}.py")


def assignment_of(name: str, arm: str, assigned: Path | None = None) -> Assignment | None:
    """The assignment of an arm; None where it does not exist (yet). `assigned` replaces the committed file."""
    study, folder = STUDIES[name], ROOT / "examples"
    roles = load_workflow(str(folder / f"{name}.py")).graph.roles()
    if arm == FEW_SHOT:
        return Assignment()
    if arm.startswith(SINGLE):
        role: dict[str, Any] = {"variant": study.single}
        budget = arm.removeprefix(SINGLE).removeprefix("@") or study.single_thinking_tokens
        if budget is not None:
            role["thinking"] = int(budget)
        return Assignment.model_validate({"roles": dict.fromkeys(roles, role)})
    if arm == SHELF_SINGLE:
        everyone = RoleAssignment(variant=study.shelf_single or BASE)
        return None if study.shelf_single is None else Assignment(roles=dict.fromkeys(roles, everyone))
    path = folder / study.by_hand if arm == BY_HAND else assigned or folder / f"{name}_assigned.yaml"
    if not path.is_file():
        return None
    assignment = load_assignment(path)
    if arm != EQUAL:
        return assignment
    if study.single_thinking_tokens is None:  # no role thinks: the arm would be the assigned one again
        return None
    thinks = {"thinking": study.single_thinking_tokens, "thinking_rounds": {}}
    given = {
        role: RoleAssignment.model_validate({**part.model_dump(exclude_defaults=True), **thinks})
        for role, part in assignment.roles.items()
    }
    return assignment.model_copy(update={"roles": given})  # a default that was not written starts no engine


def name_of_arm(name: str, arm: str, assignment: Assignment, shelf: Shelf, tasks: str = TASKS) -> str:
    """Content of an arm: workflow, assignment without its reasons, and the variants' ids."""
    ids = {variant: shelf.get(variant).id for variant in sorted(assignment.variants())}
    roles = {
        role: part.model_dump(mode="json", exclude={"reason"}, exclude_defaults=True)
        for role, part in assignment.roles.items()
    }
    graph = load_workflow(str(workflow_of(name, arm))).graph.fingerprint
    return record_key(graph=graph, roles=roles, ids=ids, tasks=tasks, block=BLOCK_TASKS)


async def measure(
    name: str, arm: str, block: int, folders: list[str], task_spec: str = TASKS, assigned: Path | None = None
) -> dict[str, Any]:
    """Run one block of tasks under one arm in this process; returns the row."""
    assignment = assignment_of(name, arm, assigned)
    assert assignment is not None
    shelf = Shelf(load_settings().shelf, also=[Path(folder) for folder in folders])
    overrides = {"engine.threads": THREADS}
    row = {
        "workflow": name,
        "arm": arm,
        "content": name_of_arm(name, arm, assignment, shelf, task_spec),
        "block": block,
    }
    file = load_workflow(str(workflow_of(name, arm)))
    places = slice(block * BLOCK_TASKS, (block + 1) * BLOCK_TASKS)
    return row | await measured_run(file, assignment, task_spec, folders, overrides, places)


def measure_missing(
    name: str, arms: list[str], folders: list[str], results: Path, tasks: str = TASKS, assigned: Path | None = None
) -> None:
    """Measure every arm and block that is not there, each in a process of its own."""
    shelf = Shelf(load_settings().shelf, also=[Path(folder) for folder in folders])
    blocks = -(-int(tasks.split(":")[1]) // BLOCK_TASKS)
    for block in range(blocks):
        for arm in in_turns(arms, block):
            assignment = assignment_of(name, arm, assigned)
            if assignment is None:
                continue
            try:
                content = name_of_arm(name, arm, assignment, shelf, tasks)
            except VariantError as error:
                print(f"{arm} is left out: {error}", file=sys.stderr)
                continue
            done = {(row["content"], row["block"]) for row in read_rows(results)}
            if (content, block) not in done:
                command = [
                    sys.executable,
                    __file__,
                    name,
                    "--one",
                    arm,
                    str(block),
                    "--tasks",
                    tasks,
                    "--results",
                    str(results),
                ]
                command += [f"--shelf={folder}" for folder in folders]
                subprocess.run([*command, *([f"--assigned={assigned}"] if assigned else [])], check=True)


def tune_single(name: str, folders: list[str], results: Path) -> None:
    """Measure the single adapter with every budget on tune tasks; prints them and the budget it should get."""
    named = [f"{SINGLE}@{budget}" for budget in STUDIES[name].budgets]
    measure_missing(name, named, folders, results, TUNE_TASKS)
    rows = {row["arm"]: row for row in read_rows(results) if row["workflow"] == name and row["arm"] in named}
    solved = {}
    for budget, arm in zip(STUDIES[name].budgets, named, strict=True):
        solved[budget] = sum(run["score"] for run in rows[arm]["runs"]) / len(rows[arm]["runs"])
        print(f"at most {budget} tokens: {solved[budget]:.2f} solved, {rows[arm]['cpu_s']:.1f} CPU-s")
    best = min(budget for budget, share in solved.items() if share >= max(solved.values()) - MARGIN)
    print(f"single_thinking_tokens={best}")


def arms_of(name: str, rows: list[dict[str, Any]]) -> list[Arm]:
    """The arms with all their blocks so far, the last content of each."""
    found = []
    for arm in ARMS:
        own = [row for row in rows if row["workflow"] == name and row["arm"] == arm]
        if own:
            blocks = {row["block"]: row for row in own if row["content"] == own[-1]["content"]}
            found.append(Arm.of(arm, [blocks[number] for number in sorted(blocks)]))
    return found


def main() -> None:
    """Parse options; without any, print what has been measured."""
    parser = arguments(__doc__)
    parser.add_argument("workflow", choices=list(STUDIES))
    parser.add_argument("--measure", action="store_true", help="run what has not been measured (minutes an arm)")
    parser.add_argument("--tune-single", action="store_true", help="what budget the single adapter should get")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--shelf", action="append", default=[], help="folder of variants; may be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--assigned", type=Path, help="assignment of the arm `assigned`; default the committed one")
    parser.add_argument("--tasks", default=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "BLOCK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        row = anyio.run(
            measure, options.workflow, options.one[0], int(options.one[1]), options.shelf, options.tasks,
            options.assigned,
        )  # fmt: skip
        append_row(options.results, row)
        solved = sum(run["score"] for run in row["runs"])
        print(f"{row['arm']}, block {row['block']}: {solved:.0f} solved, {row['cpu_s']:.1f} CPU-s", flush=True)
        return
    if options.tune_single:
        return tune_single(options.workflow, options.shelf, options.results)
    if options.measure:
        measure_missing(options.workflow, options.arms, options.shelf, options.results, assigned=options.assigned)
    arms = arms_of(options.workflow, read_rows(options.results))
    print(show(options.workflow, arms, against=(SINGLE, SHELF_SINGLE, FEW_SHOT, BY_HAND)))
    for arm in arms:
        assignment = assignment_of(options.workflow, arm.name, options.assigned)
        if assignment is not None and arm.name != FEW_SHOT:
            roles = assignment.model_dump(
                mode="json", exclude={"roles": {"__all__": {"reason"}}}, exclude_defaults=True
            )
            print(f"{arm.name}: {json.dumps(roles['roles'])}")


if __name__ == "__main__":
    main()
