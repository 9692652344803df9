"""Choose an assignment from profiles, check it by running the whole workflow, and say why it was chosen."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..agents.errors import InfeasibleError
from .coupling import Prediction, Problem, Rejected, predict
from .evaluator import Evaluator
from .intervals import bootstrap_interval, mean
from .outcomes import Outcome
from .rivals import on_one_checkpoint
from .solve import (  # fmt: skip
    Amount,
    Limits,
    Solution,
    SolverSettings,
    brute_force,
    explain_limits,
    front,
    is_excluded,
    objective,
    solve,
)
from .space import Candidate, Choices, Part

__all__ = ["AssignSettings", "Assigned", "Contender", "Goal", "Measured", "assign", "baselines", "corrected", "oracle"]

Goal = Literal["cpu_s", "cost_of_pass", "latency_s", "tokens", "memory_mib"]
ORACLE = "oracle of the measured"


class AssignSettings(BaseModel):
    """What is minimised, within which limits, and how a choice is checked.

    The check runs the choice and the incumbent on held-out tasks: the choice holds when its mean score is not below
    the incumbent's by more than `quality_loss`, and not below `limits.min_quality` where that is given. At most
    `checks` choices are tried. With `rivals` the best choice on each checkpoint alone is run too, and taken where it
    holds and costs less; also one that is predicted to miss the quality by up to `rival_shortfall`, which is what
    profiles on some fifty tasks may be off by. With `measure_baselines` the baselines are run on the same tasks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimise: Goal = "cpu_s"
    limits: Limits = Limits()
    quality_loss: float = Field(default=0.02, ge=0, le=1)
    checks: int = Field(default=8, ge=1)
    rivals: bool = True
    rival_shortfall: float = Field(default=0.1, ge=0, le=1)
    measure_baselines: bool = False
    solver: SolverSettings = SolverSettings()
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """What a choice came to on held-out tasks; `gain` is the paired difference to the incumbent, with intervals."""

    n: int
    quality: float
    quality_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]
    cpu_s: float
    seconds: float
    tokens: float

    @property
    def cost_of_pass(self) -> float:
        """CPU-seconds per solved task, failures counted."""
        return self.cpu_s / self.quality if self.quality > 0 else float("inf")


@dataclass(frozen=True)
class Contender:
    """One line of the table: a choice by name, what was expected of it and what it came to; None where unknown."""

    name: str
    choices: Mapping[Part, Candidate] | None
    prediction: Prediction | None
    measured: Measured | None = None
    note: str = ""


@dataclass(frozen=True)
class Assigned:
    """The choice, why each part got its candidate, the table with the baselines, and what was rejected and why.

    `expected` is what it will come to: its prediction, corrected by the check.
    """

    solution: Solution
    measured: Measured | None
    expected: Prediction
    reasons: dict[Part, str]
    front: list[Solution]
    table: list[Contender]
    rejected: list[Rejected]
    excluded: list[Contender]


async def assign(
    problem: Problem,
    settings: AssignSettings | None = None,
    *,
    check: Evaluator | None,
    on_note: Callable[[str], None] | None = None,
) -> Assigned:
    """The best choice by prediction that holds when the whole workflow runs on the tasks of `check`.

    One that does not hold is excluded, with all that differ from it only where nobody was asked, and the next best is
    tried. Without `check` the prediction is believed.
    Raises: InfeasibleError when no choice meets the limits, or none of those tried holds; what running raises.
    """
    settings, tell = settings or AssignSettings(), on_note or (lambda note: None)
    amount: Amount = "cpu_s" if settings.minimise == "cost_of_pass" else settings.minimise
    limits = _with_floor(problem, settings)
    excluded: list[Contender] = []
    beaten: list[Contender] = []
    barred: list[Choices] = []
    before: list[Outcome] | None = None
    while True:
        solution = choose(problem, limits, settings, barred)
        if check is None:
            measured = None
            break
        if before is None:  # not sooner: limits that cannot be met are said before anything runs
            tell(f"running the incumbent on {len(check.tasks)} held-out tasks")
            before = list(await check.outcomes(problem.incumbent, list(check.tasks)))
        tell(f"checking on {len(check.tasks)} held-out tasks: {_named(solution.choices)}")
        outcomes = await check.outcomes(solution.choices, list(check.tasks))
        measured = _measure(outcomes, before)
        missed = _missed(measured, settings)
        if not missed:
            break
        tell(f"does not hold: {missed}")
        # Whoever differs only in parts that no run came to would run the same again.
        asked = {(ask.role, ask.round) for outcome in outcomes for ask in outcome.asks}
        reached = [part for part in problem.parts if any(part.covers(*ask) for ask in asked)]
        barred.append({part: solution.choices[part] for part in reached or problem.parts})
        excluded.append(
            Contender(f"tried {len(excluded) + 1}", solution.choices, solution.prediction, measured, missed)
        )
        if len(excluded) >= settings.checks:
            raise InfeasibleError(
                f"none of {len(excluded)} assignments holds its quality end to end; the last: {missed}",
                expected="one that does, on held-out tasks",
                remedy="Allow a larger quality loss, probe on more tasks, or raise the number of checks.",
            )
    if check is not None and before is not None and measured is not None and settings.rivals:
        for rival in _rivals(problem, limits, settings, [*barred, solution.choices]):
            tell(f"running the best on one checkpoint: {_named(rival.choices)}")
            found = _measure(await check.outcomes(rival.choices, list(check.tasks)), before)
            missed = _missed(found, settings)
            loser = Contender("on one checkpoint", rival.choices, rival.prediction, found, missed)
            if not missed and _cost(found, settings.minimise) < _cost(measured, settings.minimise):
                tell(f"costs less: {_cost(found, settings.minimise):.3g}, not {_cost(measured, settings.minimise):.3g}")
                loser = Contender("best by prediction", solution.choices, solution.prediction, measured)
                solution, measured = replace(rival, method="measured"), found
            beaten.append(loser)
    table = [Contender("assigned", solution.choices, solution.prediction, measured, solution.method)]
    for contender in [*excluded, *beaten, *baselines(problem, limits, settings)]:
        if check is not None and before is not None and contender.choices is not None and contender.measured is None:
            is_incumbent = contender.choices == problem.incumbent
            if settings.measure_baselines or is_incumbent:
                tell(f"measuring {contender.name}")
                outcomes = await check.outcomes(contender.choices, list(check.tasks))
                contender = replace(contender, measured=_measure(outcomes, before))
        table.append(contender)
    if check is not None and before is not None:
        runs = [await check.outcomes(c.choices, list(check.tasks)) for c in table if c.measured and c.choices]
        table.append(oracle([*runs, before], before))
    points = front(problem, Limits(**{**limits.model_dump(), "min_quality": None}), amount, settings=settings.solver)
    reasons = explain(problem, solution, limits, amount)
    if solution.method == "measured":
        ran = "; all parts on one checkpoint ran cheaper than the best by prediction"
        reasons = {part: why.partition(";")[0] + ran for part, why in reasons.items()}
    expected = corrected(solution.prediction, measured)
    return Assigned(solution, measured, expected, reasons, points, table, list(problem.rejected), excluded)


def corrected(prediction: Prediction, measured: Measured | None) -> Prediction:
    """A prediction with what was measured in its place, and times in proportion to CPU-seconds.

    Profiles come from replacing one part at a time, and a checkpoint with one part on it makes smaller, dearer steps
    than one with all of them; the check is the first time that the choice runs as a whole.
    """
    if measured is None or not prediction.cpu_s or not measured.cpu_s:
        return prediction
    ratio = measured.cpu_s / prediction.cpu_s
    return replace(
        prediction,
        quality=measured.quality,
        cpu_s=measured.cpu_s,
        tokens=measured.tokens,
        latency_s=prediction.latency_s * ratio,
        completion_s=None if prediction.completion_s is None else prediction.completion_s * ratio,
    )


def choose(problem: Problem, limits: Limits, settings: AssignSettings, exclude: Collection[Choices]) -> Solution:
    """The best choice by prediction; raises InfeasibleError."""
    if settings.minimise != "cost_of_pass":
        return solve(problem, limits, settings.minimise, exclude=exclude, settings=settings.solver)
    # For given quality the cheapest has the lowest cost of pass, so the best one lies on the front.
    points = front(problem, limits, "cpu_s", exclude=exclude, settings=settings.solver)
    if not points:
        raise explain_limits(problem, limits, exclude, settings.solver)
    return min(points, key=lambda point: point.prediction.cost_of_pass)


def baselines(problem: Problem, limits: Limits, settings: AssignSettings) -> list[Contender]:
    """What the choice is compared with: the incumbent, all on the base, one variant, chance, greed, brute force."""
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
    return [
        Contender(name, choices, None if choices is None else predict(problem, choices), note=note)
        for name, choices, note in found
    ]


def oracle(runs: Sequence[Sequence[Outcome]], before: Sequence[Outcome]) -> Contender:
    """What a router could at best have made of the assignments measured: for each task the cheapest that solves it."""
    per_task = [
        min((o for o in task), key=lambda outcome: (-outcome.score, outcome.cpu_s)) for task in zip(*runs, strict=True)
    ]
    return Contender(ORACLE, None, None, _measure(per_task, before), "per task the cheapest that solves it")


def explain(problem: Problem, solution: Solution, limits: Limits, amount: Amount) -> dict[Part, str]:
    """For each part why its candidate: what the best other one would change, all other parts as chosen."""
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


def _with_floor(problem: Problem, settings: AssignSettings) -> Limits:
    """The limits with a quality floor: what is asked for, and the incumbent's quality less the loss allowed."""
    floor = max(problem.quality - settings.quality_loss, 0.0)
    asked = settings.limits.min_quality
    return settings.limits.model_copy(update={"min_quality": floor if asked is None else asked})


def _missed(measured: Measured, settings: AssignSettings) -> str:
    asked = settings.limits.min_quality
    if asked is not None:
        return f"quality {measured.quality:.3f} is below {asked:g}" if measured.quality < asked else ""
    if measured.gain < -settings.quality_loss:
        low, high = measured.gain_interval
        return (
            f"{-measured.gain:.3f} ({-high:.3f} to {-low:.3f}) below the incumbent, {settings.quality_loss:g} allowed"
        )
    return ""


def _measure(outcomes: Sequence[Outcome], before: Sequence[Outcome]) -> Measured:
    scores = [outcome.score for outcome in outcomes]
    gains = [a.score - b.score for a, b in zip(outcomes, before, strict=True)]
    asks = [ask for outcome in outcomes for ask in outcome.asks]
    n = len(outcomes)
    return Measured(
        n,
        mean(scores),
        bootstrap_interval(scores),
        mean(gains),
        bootstrap_interval(gains),
        sum(ask.cpu_s for ask in asks) / n,
        sum(ask.seconds + ask.swap_s for ask in asks) / n,
        sum(ask.prompt_tokens + ask.output_tokens for ask in asks) / n,
    )


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


def _rivals(problem: Problem, limits: Limits, settings: AssignSettings, known: list[Choices]) -> Iterator[Solution]:
    """The best on each checkpoint that keeps the limits by prediction, but those that are known; none for memory.

    One that misses the quality floor by no more than `rival_shortfall` is held to its own best less the loss allowed.
    """
    if settings.minimise == "memory_mib":  # which is not measured, and well predicted
        return
    floor = limits.min_quality or 0.0
    for narrowed in on_one_checkpoint(problem):
        with suppress(InfeasibleError):
            free = limits.model_copy(update={"min_quality": None})
            best = solve(narrowed, free, "quality", settings=settings.solver).prediction.quality
            if best < floor - settings.rival_shortfall:
                continue
            held = floor if best >= floor else max(best - settings.quality_loss, 0.0)
            found = choose(narrowed, limits.model_copy(update={"min_quality": held}), settings, ())
            if not is_excluded(found.choices, known):
                yield found


def _cost(measured: Measured, goal: Goal) -> float:
    return measured.seconds if goal == "latency_s" else float(getattr(measured, goal))


def _named(choices: Choices) -> str:
    return ", ".join(f"{part}={candidate}" for part, candidate in choices.items())
