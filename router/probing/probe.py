"""Measure every candidate at every part of a workflow, replacing one at a time, and stop early where it is clear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import Field

from ...agents.errors import ProfileError
from ...agents.frozen_model import FrozenModel
from ...specializers.machine.machine import Machine
from ..space import Candidate, Choices, Part
from .arms import Arm, ProbedWorkflow, ServedVariant, fit_token_cost, make_profile
from .evaluator import Evaluator
from .intervals import mean, upper_bound
from .journal import record_key
from .outcomes import AskCost, Outcome
from .profile import Footprint, Profile, TokenCost
from .search import SearchSettings, explore, find_best

__all__ = ["ProbeResult", "ProbeSettings", "probe"]


class ProbeSettings(FrozenModel):
    """How much is measured, and when a candidate at a part (an arm) is dropped.

    >>> from metier.router.probing.search import SearchSettings
    >>> ProbeSettings(batch_tasks=16, margin=0.1, search=SearchSettings(explore_runs=64)).confidence
    0.95
    """

    batch_tasks: int = Field(default=8, ge=1)
    """Tasks that all arms go through before the next look."""

    margin: float = Field(default=0.05, ge=0, le=1)
    """An arm is dropped when its mean score lies this far below another arm of its part, or below the incumbent."""

    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence of such a drop, over all arms and all looks."""

    intervals: float = Field(default=0.95, gt=0, lt=1)
    """Confidence of the reported intervals."""

    search: SearchSettings = SearchSettings(batch_tasks=4)
    """How an incumbent is searched for where none is given."""


@dataclass(frozen=True)
class ProbeResult:
    """The profiles, the incumbent they were measured around, and how many runs dropping arms early has saved."""

    incumbent: dict[Part, Candidate]
    profiles: list[Profile]
    outcomes: dict[str, list[Outcome]] = field(repr=False)
    saved_runs: int = 0


async def probe(
    evaluator: Evaluator,
    incumbent: Choices | None = None,
    settings: ProbeSettings | None = None,
    *,
    workflow: str = "",
    footprints: Mapping[str, Footprint] | None = None,
    variants: Mapping[str, str] | None = None,
    machine: Machine | None = None,
    engine_costs: Callable[[], Mapping[str, TokenCost]] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> ProbeResult:
    """Profile every candidate of every part of the evaluator's space on its tasks, paired with the incumbent.

    The incumbent is the assignment in which one part at a time is replaced; without one, the best that replacing
    single parts leads to is searched for first. `footprints` and `variants` (content ids) are by variant name;
    `machine` is what all runs are made on.
    `engine_costs` is called when all runs are done: checkpoint → cost of tokens and steps. For those that it
    lacks, cost is estimated from asks.
    Raises: ProfileError when no run solves any task or a score is not from 0 to 1, AssignmentError for an incumbent
    with candidates that are not in the space, and what running the workflow raises.
    """
    settings = settings or ProbeSettings()
    note = on_note or (lambda text: None)
    space, tasks = evaluator.space, list(evaluator.tasks)
    if not tasks:
        raise ProfileError("there are no tasks to probe on", expected="one or more")
    if incumbent is None:
        note("looking for an assignment to start from")
        start = await explore(space, tasks, evaluator.scores, settings.search)
        incumbent = await find_best(space, tasks, evaluator.scores, start, settings.search)
    incumbent = dict(incumbent)
    note("incumbent: " + _named(incumbent))
    arms = [Arm(part, c) for part in space.parts for c in space.candidates[part] if c != incumbent[part]]
    base: list[Outcome] = []
    for begin in range(0, len(tasks), settings.batch_tasks):
        batch = tasks[begin : begin + settings.batch_tasks]
        base += await evaluator.outcomes(incumbent, batch)
        for arm in arms:
            if not arm.dropped:
                arm.outcomes += await evaluator.outcomes({**incumbent, arm.part: arm.candidate}, batch)
        _drop(arms, base, settings, note)
    saved = sum(len(tasks) - len(arm.outcomes) for arm in arms)
    if mean([outcome.score for outcome in base]) == 0:
        note("the incumbent solves none of the tasks: replacing one part at a time says little")
    every = [*arms, *(Arm(part, incumbent[part], base) for part in space.parts)]
    costs = _token_costs(every, footprints or {})
    for checkpoint, cost in (engine_costs() if engine_costs else {}).items():
        costs[checkpoint] = cost.model_copy(update={"prefill_s": costs.get(checkpoint, cost).prefill_s})
    task_key = record_key(tasks=[evaluator.tasks[task] for task in tasks])
    shared = ProbedWorkflow(
        workflow, task_key, _named(incumbent), space.parts, settings.intervals, machine or Machine()
    )

    def profile(arm: Arm) -> Profile:
        name = arm.candidate.variant
        footprint = (footprints or {}).get(name, Footprint())
        served = ServedVariant(
            (variants or {}).get(name, name), footprint, costs.get(footprint.checkpoint, TokenCost())
        )
        return make_profile(arm, base[: len(arm.outcomes)], shared, served)

    order = {part: number for number, part in enumerate(space.parts)}
    every.sort(key=lambda arm: (order[arm.part], space.candidates[arm.part].index(arm.candidate)))
    outcomes = {f"{arm.part}={arm.candidate}": arm.outcomes for arm in every}
    return ProbeResult(incumbent, [profile(arm) for arm in every], outcomes, saved)


def _drop(arms: Sequence[Arm], base: Sequence[Outcome], settings: ProbeSettings, note: Callable[[str], None]) -> None:
    """Successive elimination: drop an arm when another's lead exceeds the margin, by a bound valid at every look.

    Each arm is compared with the incumbent and with the arms of its part, so the chance of error is shared by all
    these pairs.
    """
    by_part: dict[Part, list[Arm]] = {}
    for arm in arms:
        by_part.setdefault(arm.part, []).append(arm)
    pairs = sum(len(rivals) ** 2 for rivals in by_part.values())
    alpha = (1 - settings.confidence) / max(pairs, 1)
    of_incumbent = [outcome.score for outcome in base]
    going: list[tuple[Arm, str]] = []
    for rivals in by_part.values():
        alive = [arm for arm in rivals if not arm.dropped]
        for arm in alive:
            against = [("the incumbent", of_incumbent)]
            against += [(str(other.candidate), other.scores) for other in alive if other is not arm]
            for name, scores in against:
                bound = upper_bound([a - b for a, b in zip(arm.scores, scores, strict=True)], alpha)
                if bound < -settings.margin:
                    going.append((arm, f"at least {-bound:.2f} below {name} after {len(scores)} tasks"))
                    break
    for arm, why in going:
        arm.dropped = why
        note(f"{arm.part} on {arm.candidate} is dropped: {why}")


def _token_costs(arms: Sequence[Arm], footprints: Mapping[str, Footprint]) -> dict[str, TokenCost]:
    """Checkpoint → what a computed prompt token costs there."""
    asks: dict[str, dict[int, AskCost]] = {}
    for arm in arms:
        for outcome in arm.outcomes:
            for ask in outcome.asks:
                checkpoint = footprints.get(ask.variant, Footprint()).checkpoint
                asks.setdefault(checkpoint, {})[id(ask)] = ask
    return {checkpoint: fit_token_cost(list(seen.values())) for checkpoint, seen in asks.items()}


def _named(choices: Choices) -> str:
    return ", ".join(f"{part}={candidate}" for part, candidate in choices.items())
