"""Thinking budgets on an example workflow: per role against uniform, and rounds that think differently.

    metier make each of examples/recipes/ledger_{reader,accountant,auditor}.yaml
    python benchmarks/thinking_budgets.py examples/ledger.py

1. On tune rows of every role, its own variant is asked with every budget. A role's budget is the smallest whose score
   is within MARGIN of its best; the uniform budget is the smallest that is within MARGIN for every role at once.
2. On TEST_TASKS fresh tasks the whole workflow runs under each arm of `arms`; paired bootstrap over tasks.

Nothing is asked twice: the folder keeps every reply, so a killed run goes on, and arms share what they ask alike. What
a reused reply had cost is what it is said to cost. Seeds, budgets and thresholds below were committed before the first
test task was run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from harness import arguments, interval, resamples, write_rows

from metier.agents import Role, ThinkingProfile
from metier.router.probing.outcomes import Outcome
from metier.router.space import Candidate, Part
from metier.runtime.trials.probe_options import ProbeOptions
from metier.runtime.trials.run_probe import Trials, open_trials
from metier.specializers.methods.role_quality import Score, measure_role, paired_interval, same_answer
from metier.specializers.methods.thinking.curves import ThinkingPoint, fit_saturation, saturated_budget

BUDGETS = (0, 8, 16, 24, 32, 48)
MARGIN = 0.02
TUNE_ROWS, TUNE_SEED = 100, 11
TEST_TASKS, TEST_SEED = 300, 11
BAR = 0.40
"""Thinking tokens to be saved at equal accuracy."""


def arms(budgets: Mapping[str, int], uniform: int, thinker: str) -> dict[str, dict[str, tuple[int, int]]]:
    """What is compared: for each role its budget in the first round and in later ones.

    `thinker` is the role that gains most by thinking: in "later rounds think" it answers at once until it is rejected.
    """

    def same(chosen: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        return {role: (budget, budget) for role, budget in chosen.items()}

    return {
        "uniform budget": same(dict.fromkeys(budgets, uniform)),
        "budget per role": same(budgets),
        "no thinking": same(dict.fromkeys(budgets, 0)),
        "later rounds think": {**same(budgets), thinker: (0, budgets[thinker])},
        "first round thinks": {**same(budgets), thinker: (budgets[thinker], 0)},
    }


# ---- tune rows --------------------------------------------------------------------------------------------


async def role_curves(trials: Trials, module: Any) -> dict[str, list[ThinkingPoint]]:
    """Every role at every budget, on its own variant and its own tune rows."""
    return {
        name: [await _point(trials, module, role, budget) for budget in BUDGETS]
        for name, role in trials.file.graph.roles().items()
    }


async def _point(trials: Trials, module: Any, role: Role, budget: int) -> ThinkingPoint:
    rows = list(getattr(module, f"{role.name}_tune_rows")(TUNE_ROWS, TUNE_SEED))
    score: Score = getattr(module, f"{role.name}_score", same_answer)
    variant = variant_of(trials, role.name)
    quality = await measure_role(
        trials.backend, role, rows, variant, score, thinking=ThinkingProfile(max_tokens=budget)
    )
    _, low, high = paired_interval(quality.scores, [0.0] * len(rows))
    used = quality.thinking_tokens / len(rows)
    return ThinkingPoint(variant, budget, quality.mean, (low, high), used, quality.cpu_ms_per_ask, len(rows))


def choose(curves: Mapping[str, Sequence[ThinkingPoint]]) -> tuple[dict[str, int], int]:
    """Each role's own budget, and the one budget that is enough for all."""
    own = {role: saturated_budget(points, MARGIN).budget_tokens for role, points in curves.items()}
    enough = {
        role: {p.budget_tokens for p in points if p.quality >= max(q.quality for q in points) - MARGIN}
        for role, points in curves.items()
    }
    return own, min(set.intersection(*enough.values()) or {BUDGETS[-1]})


def gain(points: Sequence[ThinkingPoint]) -> float:
    """What a role gains by thinking: its best score less the one without."""
    return max(p.quality for p in points) - points[0].quality


# ---- test tasks -------------------------------------------------------------------------------------------


async def run_arms(
    trials: Trials,
    arms: Mapping[str, Mapping[Part, Candidate]],
    test_tasks: int,
    more: Callable[[Sequence[Outcome]], dict[str, Any]] = lambda outcomes: {},
) -> list[dict[str, Any]]:
    """The workflow under each arm on the same fresh tasks: a line each, paired with the first; `more` adds to it."""
    tasks = trials.file.tasks(f"test:{test_tasks}:{TEST_SEED}")
    records: list[dict[str, Any]] = []
    reference: list[Outcome] = []
    for arm, choices in arms.items():
        outcomes = await trials.evaluator(tasks).outcomes(dict(choices), [task.id for task in tasks])
        reference = reference or outcomes
        records.append(arm_row(arm, outcomes, reference) | more(outcomes))
        print(json.dumps(records[-1]), flush=True)
    return records


def run_study(
    description: str | None, folder: Path, measure: Callable[[Path, Path, int], Awaitable[list[dict[str, Any]]]]
) -> None:
    """The command of a study whose arms are known: measure on the shelf's variants, and write the lines."""
    options = study_arguments(description, folder).parse_args()
    write_rows(options.folder / "results.jsonl", anyio.run(measure, options.shelf, options.folder, options.test_tasks))


def study_arguments(description: str | None, folder: Path) -> argparse.ArgumentParser:
    """Where the variants are, where the study goes, and on how many tasks it is made."""
    parser = arguments(description)
    parser.add_argument("--shelf", type=Path, default=Path("examples/variants"))
    parser.add_argument("--folder", type=Path, default=folder)
    parser.add_argument("--test-tasks", type=int, default=TEST_TASKS)
    return parser


def choices_of(trials: Trials, budgets: Mapping[str, tuple[int, int]]) -> dict[Part, Candidate]:
    """Each part on its role's own variant, with the role's budget in the first round or in later ones."""
    choices: dict[Part, Candidate] = {}
    for part in trials.space.parts:
        first, later = budgets[part.role]
        choices[part] = Candidate(variant_of(trials, part.role), later if part.rounds == "later" else first)
    return choices


def variant_of(trials: Trials, role: str) -> str:
    """The role's own variant."""
    return f"{trials.file.graph.name}-{role}"


def thinking_tokens(outcomes: Sequence[Outcome]) -> list[float]:
    """Thinking tokens of each task."""
    return [float(sum(ask.thinking_tokens for ask in outcome.asks)) for outcome in outcomes]


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of two sums over the same tasks, with its 95 % bootstrap interval over tasks."""
    a, b = np.asarray(ours), np.asarray(theirs)
    draws = resamples(len(a))
    above, below = a[draws].sum(axis=1), b[draws].sum(axis=1)
    return float(a.sum() / max(b.sum(), 1e-9)), *interval(above / np.maximum(below, 1e-9))


def arm_row(name: str, outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> dict[str, Any]:
    """One line of the table: the arm by itself, and paired with the reference."""
    n = len(outcomes)
    scores, were = [o.score for o in outcomes], [o.score for o in reference]
    _, low, high = paired_interval(scores, [0.0] * n)
    cpu = [o.cpu_s for o in outcomes]
    solved = sum(scores)
    return {
        "arm": name,
        "tasks": n,
        "solved": round(solved / n, 4),
        "solved_interval": [round(low, 4), round(high, 4)],
        "minus_reference": [round(v, 4) for v in paired_interval(scores, were)],
        "thinking_tokens": round(sum(thinking_tokens(outcomes)) / n, 2),
        "thinking_ratio": [round(v, 3) for v in ratio_interval(thinking_tokens(outcomes), thinking_tokens(reference))],
        "asks": round(sum(len(o.asks) for o in outcomes) / n, 2),
        "cpu_s": round(sum(cpu) / n, 4),
        "cpu_ratio": [round(v, 3) for v in ratio_interval(cpu, [o.cpu_s for o in reference])],
        "cpu_s_per_solved": round(sum(cpu) / solved, 4) if solved else None,
    }


# ---- the whole --------------------------------------------------------------------------------------------


async def measure(workflow: Path, shelf: Path, folder: Path, test_tasks: int) -> list[dict[str, Any]]:
    """Curves, choice and arms; returns what is printed, one record a line."""
    teachers = load_module(workflow)
    graph = teachers.graph.build()
    own = tuple(f"{graph.name}-{role}" for role in graph.roles())
    options = ProbeOptions(workflow=str(workflow), tasks="tune:1", variants=own, shelf=(str(shelf),))
    records: list[dict[str, Any]] = []
    async with open_trials(options, folder) as trials:
        curves = await role_curves(trials, teachers)
        budgets, uniform = choose(curves)
        thinker = max(curves, key=lambda role: gain(curves[role]))
        for role, points in curves.items():
            fit = fit_saturation([p.used_tokens for p in points], [p.quality for p in points])
            records += [
                {"role": role, "budget": p.budget_tokens, "used": round(p.used_tokens, 1), "score": round(p.quality, 4),
                 "interval": [round(v, 4) for v in p.interval], "cpu_ms": round(p.cpu_ms, 2)}
                for p in points
            ]  # fmt: skip
            records.append({"role": role, "fit": {k: round(v, 4) for k, v in vars(fit).items()}})
        records.append({"budgets": budgets, "uniform": uniform, "thinker": thinker})
        chosen = {arm: choices_of(trials, of_role) for arm, of_role in arms(budgets, uniform, thinker).items()}
        return records + await run_arms(trials, chosen, test_tasks)


def load_module(workflow: Path) -> Any:
    """The workflow's module, with its teachers."""
    spec = importlib.util.spec_from_file_location(f"teachers_{workflow.stem}", workflow)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run the benchmark."""
    parser = study_arguments(__doc__, Path("runs/thinking"))
    parser.add_argument("workflow", type=Path)
    options = parser.parse_args()
    folder = options.folder / options.workflow.stem
    records = anyio.run(measure, options.workflow, options.shelf, folder, options.test_tasks)
    write_rows(folder / "results.jsonl", records)
    for record in records:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
