"""What a choice is compared with, and why each part got its candidate."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..probing.outcomes import Outcome
from ..space import Candidate, Choices, Part
from .assigned import AssignSettings, Contender, measure
from .coupling import Prediction, Problem, predict
from .limits import Amount, Limits
from .solve import Solution, brute_force, objective

__all__ = ["ORACLE", "baselines", "explain", "oracle"]


ORACLE = "oracle of the measured"


def baselines(problem: Problem, limits: Limits, settings: AssignSettings) -> list[Contender]:
    """The baselines: the incumbent, all on the base, one variant, random, greedy, brute force."""
    amount: Amount = "cpu_s" if settings.minimise == "cost_of_pass" else settings.minimise
    found: list[tuple[str, Choices | None, str]] = [("incumbent", problem.incumbent or None, "")]
    uniform = [{p: c for p in problem.parts} for c in _everywhere(problem)]
    base = {p: Candidate() for p in problem.parts}
    found.append(("all on the base", base if base in uniform else None, "" if base in uniform else "not profiled"))
    ranked = sorted(uniform, key=lambda choices: _rank(predict(problem, choices), amount))
    found.append(
        ("best single variant", ranked[0] if ranked else None, "" if ranked else "none is profiled everywhere")
    )
    rng = random.Random(settings.seed)
    found.append(("random", {p: rng.choice(sorted(problem.rows[p])) for p in problem.parts}, f"seed {settings.seed}"))
    found.append(("each role by itself", _greedy(problem, limits), "cheapest that holds alone"))
    if problem.size <= settings.solver.all_choices_limit:
        best = brute_force(problem, limits, amount)
        found.append(("brute force", best.choices if best else None, f"of {problem.size}"))
    else:
        found.append(("brute force", None, f"{problem.size} assignments are too many"))
    return [Contender(name, choices, _prediction(problem, choices), note=note) for name, choices, note in found]


def _prediction(problem: Problem, choices: Choices | None) -> Prediction | None:
    """The prediction for choices; None where one of them has no profile or is not to be chosen, as an incumbent may."""
    if choices is None or not all(choices[part] in problem.rows[part] for part in problem.parts):
        return None
    return predict(problem, choices)


def oracle(runs: Sequence[Sequence[Outcome]], before: Sequence[Outcome]) -> Contender:
    """The oracle over the measured assignments: for each task the cheapest one that solves it."""
    per_task = [
        min((o for o in task), key=lambda outcome: (-outcome.score, outcome.cpu_s)) for task in zip(*runs, strict=True)
    ]
    return Contender(ORACLE, None, None, measure(per_task, before), "per task the cheapest that solves it")


def explain(problem: Problem, solution: Solution, limits: Limits, amount: Amount) -> dict[Part, str]:
    """For each part the reason of its candidate: what the best other one would change, all other parts as chosen."""
    reasons = {}
    for part in problem.parts:
        chosen, row = solution.choices[part], problem.rows[part][solution.choices[part]]
        own = f"scores {row.quality:.3f} of {problem.quality:.3f} at {row.cpu_s:.3g} CPU-s a task"
        others = [c for c in problem.rows[part] if c != chosen]
        if not others:
            reasons[part] = f"{own}; no other candidate is left"
            continue
        predictions = {c: predict(problem, {**solution.choices, part: c}) for c in others}
        able = {c: p for c, p in predictions.items() if not limits.excess(p)}
        if able:
            second = min(able, key=lambda c: objective(able[c], amount))
            here, there = objective(solution.prediction, amount), objective(able[second], amount)
            reasons[part] = f"{own}; next is {second}: {amount} {there:.3g} instead of {here:.3g} in all"
        else:
            second = min(predictions, key=lambda c: limits.excess(predictions[c]))
            reasons[part] = f"{own}; all others miss a limit, {second} by {limits.excess(predictions[second]):.0%}"
    return reasons


def _everywhere(problem: Problem) -> list[Candidate]:
    first = problem.parts[0]
    return [c for c in problem.rows[first] if all(c in problem.rows[part] for part in problem.parts)]


def _rank(prediction: Prediction, amount: Amount) -> tuple[float, float]:
    return -prediction.quality, objective(prediction, amount)


def _greedy(problem: Problem, limits: Limits) -> dict[Part, Candidate]:
    """For each part alone the cheapest candidate that keeps the quality with all others as the incumbent has them."""
    floor = limits.min_quality or 0.0
    chosen = {}
    for part in problem.parts:
        rows = problem.rows[part]
        able = [c for c in rows if rows[c].quality >= floor]
        best = max(rows, key=lambda c: (rows[c].quality, -rows[c].cpu_s))
        chosen[part] = min(able, key=lambda c: rows[c].cpu_s) if able else best
    return chosen
