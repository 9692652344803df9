"""Choose an assignment from profiles, check it by running the whole workflow, and say why it was chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import replace

from ...agents.errors import InfeasibleError, ProfileError
from ..probing.evaluator import Evaluator
from ..probing.outcomes import Outcome
from ..space import Choices
from .assigned import Assigned, AssignSettings, Contender, Goal, Measured, measure
from .baselines import baselines, explain, oracle
from .coupling import Prediction, Problem
from .limits import Amount, Limits
from .solve import Solution, explain_limits, front, is_excluded, solve

__all__ = ["assign", "corrected", "on_one_checkpoint"]


async def assign(
    problem: Problem,
    settings: AssignSettings | None = None,
    *,
    check: Evaluator | None,
    on_note: Callable[[str], None] | None = None,
) -> Assigned:
    """The best choice by prediction that passes the check: the whole workflow run on held-out tasks.

    A choice that fails the check is excluded, together with every choice that differs from it only in parts no run
    reached. Then the next best is tried. Without `check` nothing is run.
    Raises: InfeasibleError when no choice meets the limits or none of those tried passes; ProfileError for a limit on
    memory that is not known; what running raises.
    """
    settings, note = settings or AssignSettings(), on_note or (lambda text: None)
    amount: Amount = "cpu_s" if settings.minimise == "cost_of_pass" else settings.minimise
    limits = _with_floor(problem, settings)
    if not problem.memory_known and (amount == "memory_mib" or limits.memory_mib is not None):
        raise ProfileError(
            "what these candidates take in memory is not known: they were probed on servers elsewhere",
            expected="a limit or goal that was measured",
            remedy="Probe with `--engine embedded`, or leave --max-memory-mib and --minimise memory_mib out.",
        )
    excluded: list[Contender] = []
    beaten: list[Contender] = []
    barred: list[Choices] = []
    before: list[Outcome] | None = None
    while True:
        solution = choose(problem, limits, settings, barred)
        if check is None:
            measured = None
            break
        if before is None:  # not before solving: limits that cannot be met are reported before anything runs
            note(f"running the incumbent on {len(check.tasks)} held-out tasks")
            before = list(await check.outcomes(problem.incumbent, list(check.tasks)))
        note(f"checking on {len(check.tasks)} held-out tasks: {_named(solution.choices)}")
        outcomes = await check.outcomes(solution.choices, list(check.tasks))
        measured = measure(outcomes, before)
        missed = _missed(measured, settings)
        if not missed:
            break
        note(f"fails the check: {missed}")
        # A choice that differs only in parts no run reached would give the same runs again.
        asked = {(ask.role, ask.round) for outcome in outcomes for ask in outcome.asks}
        reached = [part for part in problem.parts if any(part.covers(*ask) for ask in asked)]
        barred.append({part: solution.choices[part] for part in reached or problem.parts})
        excluded.append(
            Contender(f"tried {len(excluded) + 1}", solution.choices, solution.prediction, measured, missed)
        )
        if len(excluded) >= settings.checks:
            raise InfeasibleError(
                f"none of {len(excluded)} assignments passes the check on held-out tasks; the last: {missed}",
                expected="one that does",
                remedy="Allow a larger quality loss, probe on more tasks, or raise the number of checks.",
            )
    if check is not None and before is not None and measured is not None and settings.rivals:
        for rival in _rivals(problem, limits, settings, [*barred, solution.choices]):
            note(f"running the best on one checkpoint: {_named(rival.choices)}")
            found = measure(await check.outcomes(rival.choices, list(check.tasks)), before)
            missed = _missed(found, settings)
            loser = Contender("on one checkpoint", rival.choices, rival.prediction, found, missed)
            if not missed and _cost(found, settings.minimise) < _cost(measured, settings.minimise):
                note(f"costs less: {_cost(found, settings.minimise):.3g}, not {_cost(measured, settings.minimise):.3g}")
                loser = Contender("best by prediction", solution.choices, solution.prediction, measured)
                solution, measured = replace(rival, method="measured"), found
            beaten.append(loser)
    table = [Contender("assigned", solution.choices, solution.prediction, measured, solution.method)]
    for contender in [*excluded, *beaten, *baselines(problem, limits, settings)]:
        if check is not None and before is not None and contender.choices is not None and contender.measured is None:
            is_incumbent = contender.choices == problem.incumbent
            if settings.measure_baselines or is_incumbent:
                note(f"measuring {contender.name}")
                outcomes = await check.outcomes(contender.choices, list(check.tasks))
                contender = replace(contender, measured=measure(outcomes, before))
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
    """The prediction with measured amounts put in, and times scaled by the measured CPU-seconds.

    Profiles come from replacing one part at a time. A checkpoint that serves one part makes smaller, more expensive
    steps than one that serves all; the check is the first run of the choice as a whole.
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


def _with_floor(problem: Problem, settings: AssignSettings) -> Limits:
    """The limits with a quality floor: `min_quality`, or the incumbent's quality less `quality_loss`."""
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


def _rivals(problem: Problem, limits: Limits, settings: AssignSettings, known: list[Choices]) -> Iterator[Solution]:
    """On each checkpoint alone the best choice within the limits, unless measured already; none for memory.

    Where the best misses the quality floor by at most `rival_shortfall`, the floor is that best less `quality_loss`.
    """
    if settings.minimise == "memory_mib":  # memory is not measured, and its prediction is good
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


def on_one_checkpoint(problem: Problem) -> Iterator[Problem]:
    """The problem with the candidates of one checkpoint only, for every one that has some for each part."""
    served = {row.footprint.checkpoint for rows in problem.rows.values() for row in rows.values()}
    for checkpoint in sorted(served):
        rows = {
            part: {c: row for c, row in problem.rows[part].items() if row.footprint.checkpoint == checkpoint}
            for part in problem.parts
        }
        if len(served) > 1 and all(rows.values()):
            yield replace(problem, rows=rows)
