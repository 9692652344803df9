"""The cheapest choice within limits: exact by mixed-integer programming, by local search where that is too large."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ...agents.errors import InfeasibleError
from ...agents.frozen_model import FrozenModel
from ..space import Candidate, Choices, Part
from .coupling import Prediction, Problem, predict
from .integer_program import OutOfTime, integer_program
from .limits import TOLERANCE, Amount, Limits

__all__ = [
    "Solution",
    "SolverSettings",
    "all_choices",
    "brute_force",
    "explain_limits",
    "front",
    "local_search",
    "solve",
]


class SolverSettings(FrozenModel):
    """How the cheapest choice is searched for: exactly where the problem is small, else by local search.

    >>> SolverSettings(exact_time_s=5.0).restarts
    12
    """

    exact_pairs: int = Field(default=240, ge=0)
    """Problems with up to this many pairs of part and candidate are solved exactly."""

    exact_time_s: float = Field(default=20.0, gt=0)
    """Seconds for that. What takes longer goes to local search."""

    restarts: int = Field(default=12, ge=1)
    """Starting points of local search."""

    all_choices_limit: int = Field(default=20_000, ge=0)
    """Up to this many choices are looked at one by one where all of them are wanted."""

    front_points: int = Field(default=24, ge=1)
    """Most points of the front of cost and quality."""

    seed: int = 0
    """Seed of local search."""


@dataclass(frozen=True)
class Solution:
    """A choice, what is expected of it, and how it was found; `measured` is one that ran cheaper than the best did."""

    choices: dict[Part, Candidate]
    prediction: Prediction
    method: Literal["milp", "local search", "brute force", "measured"]

    @property
    def exact(self) -> bool:
        """Whether no other choice can be better, by prediction."""
        return self.method in ("milp", "brute force")


def solve(
    problem: Problem,
    limits: Limits | None = None,
    minimise: Amount = "cpu_s",
    *,
    exclude: Collection[Choices] = (),
    settings: SolverSettings | None = None,
) -> Solution:
    """The best choice within limits that is none of `exclude`, which may name some parts only.

    Raises: InfeasibleError that says which limit binds and what is feasible nearest to it.
    """
    found = find(problem, limits or Limits(), minimise, exclude, settings or SolverSettings())
    if found is None:
        raise explain_limits(problem, limits or Limits(), exclude, settings or SolverSettings())
    return found


def find(
    problem: Problem, limits: Limits, minimise: Amount, exclude: Collection[Choices], settings: SolverSettings
) -> Solution | None:
    """As `solve`, None where nothing is feasible (or local search finds nothing that is)."""
    pairs = sum(len(problem.rows[part]) for part in problem.parts)
    if pairs <= settings.exact_pairs:
        try:
            choices = integer_program(problem, limits, minimise, exclude, time_s=settings.exact_time_s)
            return None if choices is None else Solution(choices, predict(problem, choices), "milp")
        except OutOfTime:
            pass
    return local_search(problem, limits, minimise, exclude=exclude, settings=settings)


def objective(prediction: Prediction, minimise: Amount) -> float:
    """What is minimised, as a number."""
    return -prediction.quality if minimise == "quality" else float(getattr(prediction, minimise))


def is_excluded(choices: Choices, exclude: Collection[Choices]) -> bool:
    """Whether a choice is excluded: it agrees with one of `exclude` on all parts that this one names."""
    return any(all(choices.get(part) == candidate for part, candidate in barred.items()) for barred in exclude)


def all_choices(problem: Problem) -> Iterator[dict[Part, Candidate]]:
    """Every choice there is."""
    for candidates in itertools.product(*(problem.rows[part] for part in problem.parts)):
        yield dict(zip(problem.parts, candidates, strict=True))


def brute_force(
    problem: Problem, limits: Limits | None = None, minimise: Amount = "cpu_s", *, exclude: Collection[Choices] = ()
) -> Solution | None:
    """The best choice by looking at every one: the oracle of the solvers, and a baseline where it is affordable."""
    limits = limits or Limits()
    best: Solution | None = None
    for choices in all_choices(problem):
        prediction = predict(problem, choices)
        if limits.excess(prediction) or is_excluded(choices, exclude):
            continue
        if best is None or objective(prediction, minimise) < objective(best.prediction, minimise):
            best = Solution(choices, prediction, "brute force")
    return best


def local_search(
    problem: Problem,
    limits: Limits | None = None,
    minimise: Amount = "cpu_s",
    *,
    exclude: Collection[Choices] = (),
    settings: SolverSettings | None = None,
) -> Solution | None:
    """A good choice by steepest descent from several starts; a limit that is missed weighs more than any cost.

    Moves: another candidate for one part; for two parts; one candidate for every part that has it, which empties an
    engine, as no single move can.
    """
    limits, settings = limits or Limits(), settings or SolverSettings()
    rng = random.Random(settings.seed)

    def rank(choices: Choices) -> tuple[float, float]:
        prediction = predict(problem, choices)
        return limits.excess(prediction) + is_excluded(choices, exclude), objective(prediction, minimise)

    best: dict[Part, Candidate] | None = None
    for start in _starts(problem, rng, settings.restarts):
        found = _descend(problem, start, rank)
        if best is None or rank(found) < rank(best):
            best = found
    if best is None or rank(best)[0] > 0:
        return None
    return Solution(best, predict(problem, best), "local search")


def front(
    problem: Problem,
    limits: Limits | None = None,
    cost: Amount = "cpu_s",
    *,
    exclude: Collection[Choices] = (),
    settings: SolverSettings | None = None,
) -> list[Solution]:
    """The Pareto front of cost and quality within limits, cheapest first.

    All of it where there are few choices, else the points of rising quality that the solver finds one by one.
    """
    limits, settings = limits or Limits(), settings or SolverSettings()
    if problem.size <= settings.all_choices_limit:
        every = ((choices, predict(problem, choices)) for choices in all_choices(problem))
        kept = [
            Solution(choices, p, "brute force")
            for choices, p in every
            if not limits.excess(p) and not is_excluded(choices, exclude)
        ]
        return _thinned(undominated(kept, cost), settings.front_points)
    points: list[Solution] = []
    floor = limits.min_quality or 0.0
    while len(points) < settings.front_points:
        cheapest = find(problem, limits.model_copy(update={"min_quality": floor or None}), cost, exclude, settings)
        if cheapest is None:
            break
        points.append(cheapest)
        floor = min(max(cheapest.prediction.quality, floor) * 1.002 + 1e-6, 1.0)
        if cheapest.prediction.quality >= 1.0:
            break
    return undominated(points, cost)


def undominated(solutions: Collection[Solution], cost: Amount) -> list[Solution]:
    """The solutions that no other dominates in cost and quality, cheapest first."""
    kept: list[Solution] = []
    for solution in sorted(solutions, key=lambda s: (objective(s.prediction, cost), -s.prediction.quality)):
        if not kept or solution.prediction.quality > kept[-1].prediction.quality + TOLERANCE:
            kept.append(solution)
    return kept


def explain_limits(
    problem: Problem, limits: Limits, exclude: Collection[Choices], settings: SolverSettings
) -> InfeasibleError:
    """The error that names each binding limit (without it the others can be met) and the nearest feasible value."""
    names: dict[str, tuple[str, Amount]] = {
        "min_quality": ("quality", "quality"),
        "cpu_s": ("CPU-seconds a task", "cpu_s"),
        "latency_s": ("seconds a task", "latency_s"),
        "tokens": ("tokens a task", "tokens"),
        "memory_mib": ("MiB of memory", "memory_mib"),
    }
    binding, alone = [], []
    for name, limit in limits.given().items():
        what, amount = names[name]
        nearest = find(problem, limits.model_copy(update={name: None}), amount, exclude, settings)
        if nearest is not None:
            reached = getattr(nearest.prediction, amount)
            binding.append(f"{name}={limit:g} (nearest feasible: {reached:.4g} {what})")
        extreme = find(problem, Limits(), amount, exclude, settings)
        if extreme is not None:
            alone.append(f"{name}={limit:g} (alone at best {getattr(extreme.prediction, amount):.4g})")
    if binding:
        return InfeasibleError(
            "no assignment meets the limits",
            expected="another value of " + ", or of ".join(binding) + ", all other limits kept",
            remedy="Change one of these, or add variants.",
        )
    if alone:
        return InfeasibleError(
            "no assignment meets the limits, also not without any one of them",
            expected="limits that can be met together: " + ", ".join(alone),
            remedy="Change two or more of them, or add variants.",
        )
    return InfeasibleError(
        "every assignment has been tried and excluded",
        expected="one that passes the check",
        remedy="Lower the quality asked for, or add variants.",
    )


def _starts(problem: Problem, rng: random.Random, restarts: int) -> Iterator[dict[Part, Candidate]]:
    rows = problem.rows
    yield {part: min(rows[part], key=lambda c: problem.lone[part, c].cpu_s) for part in problem.parts}
    yield {part: max(rows[part], key=lambda c: problem.lone[part, c].log_ratio) for part in problem.parts}
    for _ in range(max(restarts - 2, 0)):
        yield {part: rng.choice(list(rows[part])) for part in problem.parts}


def _descend(
    problem: Problem, start: dict[Part, Candidate], rank: Callable[[Choices], tuple[float, float]]
) -> dict[Part, Candidate]:
    best, best_rank = start, rank(start)
    while True:
        found, found_rank = None, best_rank
        for neighbour in _neighbours(problem, best):
            neighbour_rank = rank(neighbour)
            if neighbour_rank < found_rank:
                found, found_rank = neighbour, neighbour_rank
        if found is None:
            return best
        best, best_rank = found, found_rank


PAIR_MOVES_LIMIT = 2_000
"""Moves of two parts are left out where there are more of them than this."""


def _neighbours(problem: Problem, choices: Mapping[Part, Candidate]) -> Iterator[dict[Part, Candidate]]:
    moves = [(p, c) for p in problem.parts for c in problem.rows[p] if c != choices[p]]
    for part, candidate in moves:
        yield {**choices, part: candidate}
    for candidate in dict.fromkeys(c for _, c in moves):
        yield {p: candidate if candidate in problem.rows[p] else choices[p] for p in problem.parts}
    if len(moves) ** 2 / 2 <= PAIR_MOVES_LIMIT:
        for (p, c), (q, d) in itertools.combinations(moves, 2):
            if p != q:
                yield {**choices, p: c, q: d}


def _thinned(points: list[Solution], limit: int) -> list[Solution]:
    """At most so many points, the two ends among them."""
    if len(points) <= limit:
        return points
    return [points[math.floor(i * (len(points) - 1) / max(limit - 1, 1))] for i in range(limit)]
