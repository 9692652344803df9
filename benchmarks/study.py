"""A whole study of one example workflow: make its variants, probe them, assign, and measure before and after.

    python benchmarks/study.py ledger               # hours on two cores, nearly all of it training
    python benchmarks/study.py gift_card --dry-run  # the commands, to run by hand

It probes twice, the second time around what the first assignment chose: replacing one role at a time says little far
from where it starts. Every command goes on where it was stopped, and what is already there is not made again; so does
the whole. Variants, journals, Pareto fronts and assignments are left in runs/studies/NAME.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from harness import arguments

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Steps:
    """What one study makes (recipes in order) and what it lets the solver choose from, around which incumbent."""

    recipes: tuple[str, ...]
    candidates: tuple[str, ...]
    incumbent: str
    split_rounds: bool = False


CHECK = "tune:144:9"
"""Tasks that a choice is checked on: of 48, losing one would already be more than the 0.02 that `assign` allows."""

STUDIES = {
    "ledger": Steps(
        ("ledger_single", "ledger_single_w8a8", "ledger_shallow"),
        ("base", "ledger-single@48", "ledger-single-w8a8@0", "ledger-single-w8a8@48", "ledger-shallow@0",
         "ledger-shallow@48"),
        "ledger_single_assignment.yaml",
    ),
    "gift_card": Steps(
        ("gift_card_single", "gift_card_single_w8a8", "gift_card_shallow"),
        ("base", "gift-card-single@0", "gift-card-single@64", "gift-card-single-w8a8@0", "gift-card-single-w8a8@64",
         "gift-card-shallow@0", "gift-card-shallow@64"),
        "gift_card_single_assignment.yaml",
        split_rounds=True,
    ),
    "solve_and_check": Steps(
        ("puzzles_single", "puzzles_single_w8a8", "puzzles_shallow", "solver_w8a8"),
        ("base", "puzzles-single", "puzzles-single-w8a8", "puzzles-shallow", "planner", "solver", "critic",
         "solver-w8a8"),
        "solve_and_check_single_assignment.yaml",
    ),
}  # fmt: skip


def commands(name: str, folder: Path) -> list[list[str]]:
    """The commands of a study, in order; paths are relative to the repository where they can be."""
    steps = STUDIES[name]
    folders = [str(folder / "shelf"), "examples/variants"]
    found = [["metier", "make", f"examples/recipes/{recipe}.yaml", "--shelf", "examples/variants"]
             for recipe in steps.recipes]  # fmt: skip
    first, assigned = str(folder / "assigned_first.yaml"), str(folder / "assigned.yaml")
    rounds = "--split-rounds" if steps.split_rounds else "--no-split-rounds"
    for incumbent, probe, out in (
        (f"examples/{steps.incumbent}", str(folder / "probe"), first),
        (first, str(folder / "probe_second"), assigned),
    ):
        found.append([
            "metier", "probe", f"examples/{name}.py", "--tasks", "tune:48",
            *(w for f in folders for w in ("--shelf", f)), "--incumbent", incumbent,
            "--variants", ",".join(steps.candidates), rounds, "--out", probe, "--set", "engine.threads=1",
        ])  # fmt: skip
        found.append([
            "metier", "assign", "--probe", probe, "--minimise", "cost_of_pass", "--check", CHECK, "--out", out,
        ])  # fmt: skip
    found.append([
        "python", "benchmarks/before_after.py", name, "--measure", *(f"--shelf={f}" for f in folders),
        "--assigned", assigned, "--results", str(folder / "before_after.jsonl"),
    ])  # fmt: skip
    return found


def main() -> None:
    """Run the study, or show it."""
    parser = arguments(__doc__)
    parser.add_argument("workflow", choices=list(STUDIES))
    parser.add_argument("--folder", type=Path, help="where everything goes; default runs/studies/NAME")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    options = parser.parse_args()
    folder = options.folder or Path("runs") / "studies" / options.workflow
    environment = os.environ | {"METIER_SHELF": str((ROOT / folder / "shelf").resolve())}
    if options.dry_run:
        print(f"export METIER_SHELF={shlex.quote(environment['METIER_SHELF'])}")
    for words in commands(options.workflow, folder):
        print(("" if options.dry_run else "$ ") + shlex.join(words), flush=True)
        if not options.dry_run:
            place = Path(sys.executable)
            program = [str(place)] if words[0] == "python" else [str(place.with_name(words[0]))]
            try:
                subprocess.run([*program, *words[1:]], cwd=ROOT, env=environment, check=True)
            except KeyboardInterrupt:
                sys.exit("stopped; the same command goes on here")
            except subprocess.CalledProcessError as error:
                sys.exit(f"that ended with status {error.returncode}; the same command goes on here")


if __name__ == "__main__":
    main()
