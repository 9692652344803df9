"""PAT against the unpruned LoRA of equal trained parameters, random channels and training-free pruning, on one role.

    python benchmarks/pruning_study.py                       # the table of what has been measured (no training)
    python benchmarks/pruning_study.py --train --evaluate --arms lora pat-448 pat-448-random --folder runs/pruning

The role is the planner of `examples/puzzles.py`. All arms see the same rows in the same order, with the same steps,
batches and schedule; training-free arms are pruned first and then get the same LoRA. Puzzles are the test split's,
answers come from the real engine, greedy, under the answer type's grammar, and count when the expression has the
right value. Decided before anything was measured: a pruned arm holds the role's quality if the lower end of its
paired 95 % interval against `lora` is above -3 points. What exists is skipped, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from cost_of_pass import mean_interval
from harness import append_row, arguments, print_table, read_rows
from made_variants import make

from metier.runtime.engines.pool import EnginePool
from metier.runtime.settings.engine import EngineSettings
from metier.specializers import Recipe, Shelf, find_base
from metier.specializers.methods.role_quality import measure_role

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from puzzles import planner, planner_rows, planner_score  # noqa: E402

RESULTS = Path(__file__).parent / "pruning_study.jsonl"
TEST_ROWS = 300
MARGIN_POINTS = 3
TRAINING: dict[str, Any] = {
    "steps": 300,
    "batch_rows": 16,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 20,
}
LORA = {"method": "lora", "rank": 24, "alpha": 48, **TRAINING}
"""7.3 million trained parameters, as PAT's LoRA of rank 16 and its operators of rank 32 have together (7.1)."""
PAT = {"method": "pat", "lora_rank": 16, "lora_alpha": 32, "operator_rank": 32, **TRAINING}
ARMS: dict[str, list[dict[str, Any]]] = {
    "base": [],
    "lora": [LORA],
    "pat-512": [{**PAT, "hidden_size": 512}],
    "pat-448": [{**PAT, "hidden_size": 448}],
    "pat-432": [{**PAT, "hidden_size": 432}],
    "pat-400": [{**PAT, "hidden_size": 400}],
    "pat-448-random": [{**PAT, "hidden_size": 448, "channels": "random"}],
    "pat-448-zeros": [{**PAT, "hidden_size": 448, "mask_start": "zeros"}],
    "pat-448-untied": [{**PAT, "hidden_size": 448, "embedding_operator": "trained"}],
    # As many parameters as at hidden 448, taken out of MLPs or blocks, then the same LoRA.
    "maw-960": [{"method": "width_pruning", "intermediate_size": 960, "score": "maw"}, LORA],
    "activation-960": [{"method": "width_pruning", "intermediate_size": 960, "score": "activation"}, LORA],
    "depth-22": [{"method": "depth_pruning", "layers": 22, "score": "cosine"}, LORA],
}


def recipe(arm: str, seed: int) -> Recipe:
    """The recipe of an arm's variant."""
    data = {"program": "examples/puzzles.py:planner_rows", "size": 6000}
    return Recipe.model_validate({"name": arm, "seed": seed, "data": data, "methods": ARMS[arm], "folder": ROOT})


def train(arm: str, seed: int, folder: Path) -> None:
    """Make the arm's variant if it is not there yet."""
    if not ARMS[arm]:
        return
    make(arm, recipe(arm, seed), Shelf(folder / f"shelf-{seed}"))


async def measure(arm: str, seed: int, folder: Path, results: Path) -> None:
    """Ask the arm every test row, and write which it got right."""
    shelf = Shelf(folder / f"shelf-{seed}")
    variant = None if not ARMS[arm] else arm
    rows = list(planner_rows(TEST_ROWS, 0, "test"))
    settings = EngineSettings(adapter_slots=1, slot_rank=32, max_running=16, max_model_tokens=512)
    adapters = variant is not None and shelf.get(variant).ask.adapter is not None
    base = find_base("smollm2-135m")
    async with EnginePool(base, lambda name: (shelf.get(name), shelf.path(name)), settings, adapters=adapters) as pool:
        quality = await measure_role(pool, planner, rows, variant, planner_score)
    solved = "".join(str(int(score)) for score in quality.scores)
    row: dict[str, Any] = {"seed": seed, "arm": arm, "variant": variant and shelf.get(variant).id, "solved": solved}
    row["cpu_ms_per_ask"] = round(quality.cpu_ms_per_ask, 2)
    if variant is not None:
        row["parameters_of_base"] = shelf.get(variant).card.get("parameters_of_base", 1.0)
    append_row(results, row)
    print(f"{arm}: {solved.count('1') / len(solved):.3f}", flush=True)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean with its 95 % bootstrap interval, in per cent."""
    low, high = mean_interval(values)
    return 100 * float(values.mean()), 100 * low, 100 * high


def print_tables(results: list[dict[str, Any]]) -> None:
    """Accuracy per arm, and paired differences to the unpruned LoRA on the same rows; one table a seed."""
    for seed in sorted({row["seed"] for row in results}):
        rows = {row["arm"]: row for row in results if row["seed"] == seed}
        solved = {arm: np.array([int(c) for c in rows[arm]["solved"]]) for arm in ARMS if arm in rows}
        print(f"\nSeed {seed}: per cent of {TEST_ROWS} test rows of the planner solved\n")
        lines = []
        for arm, marks in solved.items():
            mean, low, high = interval(marks)
            paired = "-"
            if "lora" in solved and arm != "lora":
                paired = "{:+.1f} ({:+.1f} to {:+.1f})".format(*interval(marks - solved["lora"]))
            size = rows[arm].get("parameters_of_base", 1.0)
            lines.append((arm, f"{size:.3f}", f"{mean:.1f} ({low:.1f} to {high:.1f})", paired))
        print_table(("arm", "parameters / base", "solved (95 %)", "minus lora, paired (95 %)"), lines)


def main() -> None:
    """Parse options; without any, print what has been measured."""
    parser = arguments(__doc__)
    parser.add_argument("--train", action="store_true", help="make the variants that are missing (half an hour each)")
    parser.add_argument("--evaluate", action="store_true", help="ask the engine what has not been asked")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "pruning-study", help="where variants go")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.measure:
        anyio.run(measure, options.arms[0], options.seed, options.folder, options.results)
        return
    done = {row["arm"] for row in read_rows(options.results) if row["seed"] == options.seed}
    for arm in options.arms:
        if options.train:
            train(arm, options.seed, options.folder)
        if options.evaluate and arm not in done:
            # A process each: an engine gives its memory back when its process ends.
            places = ["--folder", str(options.folder), "--results", str(options.results), "--seed", str(options.seed)]
            subprocess.run([sys.executable, __file__, "--measure", "--arms", arm, *places], check=True)
    print_tables(read_rows(options.results))


if __name__ == "__main__":
    main()
