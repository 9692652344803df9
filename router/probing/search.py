"""Find the assignment that solves most, with few runs: duels that end as soon as they are decided."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from pydantic import Field

from ...agents.errors import ProfileError
from ...agents.frozen_model import FrozenModel
from ..space import Candidate, Choices, Part, Space
from .intervals import upper_bound

__all__ = ["Duel", "Score", "SearchSettings", "explore", "find_best"]

Score = Callable[[Choices, Sequence[str]], Awaitable[list[float]]]
"""Scores of tasks under a choice, in their order."""


class SearchSettings(FrozenModel):
    """How an assignment to start from is found: first by exploring, then by duels of two choices on the same tasks."""

    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Chance that some duel of a sweep is decided wrongly."""

    batch_tasks: int = Field(default=1, ge=1)
    """Tasks of a duel that are run before the next look."""

    random_tasks: int = Field(default=12, ge=0)
    """Where the better choice failed more tasks than this, a duel begins with this many in random order, which may end
    it early. Else it begins with the failed ones."""

    explore_runs: int = Field(default=128, ge=1)
    """Most runs of exploring."""

    settled_runs: int = Field(default=24, ge=1)
    """Exploring ends when the likeliest choice has stayed the same for this many runs."""

    sweeps: int = Field(default=8, ge=1)
    """Most rounds of duels over all parts."""

    seed: int = 0
    """Seed of the order of tasks, parts and candidates."""


@dataclass
class Duel:
    """Two choices on the same tasks; `best` and `other` are the scores known so far, by task.

    Ends early when the tasks not seen cannot change which has the higher total, or, with a small chance of error, when
    an anytime-valid bound on the difference of means excludes 0.
    """

    tasks: Sequence[str]
    best: dict[str, float]
    other: dict[str, float] = field(default_factory=dict)
    alpha: float = 0.05
    _random: list[float] = field(default_factory=list)
    # Only tasks met in random order say something about the mean; those chosen by score do not.
    chosen_by_score: bool = False

    def see(self, task: str, best: float, other: float) -> None:
        """Record both scores on one task."""
        self.best[task], self.other[task] = best, other
        if not self.chosen_by_score:
            self._random.append(other - best)

    @property
    def lead(self) -> float:
        """By how much the other is ahead on the tasks both have done."""
        return sum(self.other[task] - self.best[task] for task in self.other)

    def verdict(self) -> bool | None:
        """Whether the other wins; None while that is open. A draw is no win."""
        unseen = [task for task in self.tasks if task not in self.other]
        most = sum(1.0 - self.best.get(task, 0.0) for task in unseen)
        least = -sum(self.best.get(task, 1.0) for task in unseen)
        if self.lead + most <= 0:
            return False
        if self.lead + least > 0:
            return True
        if self.chosen_by_score or not self._random:
            return None
        if upper_bound(self._random, self.alpha / 2) < 0:
            return False
        if upper_bound([-value for value in self._random], self.alpha / 2) < 0:
            return True
        return None


async def explore(space: Space, tasks: Sequence[str], score: Score, settings: SearchSettings) -> dict[Part, Candidate]:
    """The choice that is likeliest to be the best after some runs, one task each.

    A run is taken to be solved when every part succeeds (a noisy AND). So one success raises the estimate of all its
    candidates, and one failure lowers most those that were estimated low. The next choice to run is drawn from the
    estimates so far (Thompson sampling). Raises: ProfileError when no run solves anything.
    """
    rng = random.Random(settings.seed)
    seen: list[tuple[Choices, float]] = []
    belief = _Belief(space)
    likeliest, since = belief.likeliest(), 0
    order = rng.sample(list(tasks), len(tasks))
    for number in range(settings.explore_runs):
        choices = belief.draw(rng)
        (result,) = await score(choices, [order[number % len(order)]])
        seen.append((choices, result))
        belief.learn(seen)
        before, likeliest = likeliest, belief.likeliest()
        since = since + 1 if likeliest == before else 0
        if since >= settings.settled_runs and any(result > 0 for _, result in seen):
            return likeliest
    if any(result > 0 for _, result in seen):
        return likeliest
    raise ProfileError(
        f"none of {settings.explore_runs} runs under different assignments solved its task",
        expected="one that does, to measure the others by",
        remedy="Name an assignment with --incumbent, or add variants.",
    )


class _Belief:
    """Estimated success rate of each candidate at its part: a Beta distribution, by expectation maximisation."""

    ITERATIONS = 10

    def __init__(self, space: Space) -> None:
        self._space = space
        self._counts = {(part, c): (0.0, 0.0) for part in space.parts for c in space.candidates[part]}

    def rate(self, part: Part, candidate: Candidate) -> float:
        """Mean of the estimate."""
        good, bad = self._counts[part, candidate]
        return (good + 1) / (good + bad + 2)

    def learn(self, seen: Sequence[tuple[Choices, float]]) -> None:
        """Fit the estimates to the runs so far; a failure is shared among its parts by how likely each failed."""
        for _ in range(self.ITERATIONS):
            counts = dict.fromkeys(self._counts, (0.0, 0.0))
            for choices, result in seen:
                rates = {part: self.rate(part, choices[part]) for part in self._space.parts}
                failed = 1.0 - math.prod(rates.values())
                for part, rate in rates.items():
                    good, bad = counts[part, choices[part]]
                    blame = (1.0 - result) * (1.0 - rate) / failed
                    counts[part, choices[part]] = (good + 1.0 - blame, bad + blame)
            self._counts = counts

    def draw(self, rng: random.Random) -> dict[Part, Candidate]:
        """A choice that may be the best, drawn by how likely that is."""

        def drawn(part: Part, candidate: Candidate) -> float:
            good, bad = self._counts[part, candidate]
            return rng.betavariate(good + 1, bad + 1)

        return {p: max(self._space.candidates[p], key=lambda c, p=p: drawn(p, c)) for p in self._space.parts}  # type: ignore[misc]

    def likeliest(self) -> dict[Part, Candidate]:
        """For each part the candidate with the highest estimate."""
        return {
            p: max(self._space.candidates[p], key=lambda c, p=p: self.rate(p, c))  # type: ignore[misc]
            for p in self._space.parts
        }


async def find_best(
    space: Space, tasks: Sequence[str], score: Score, start: Choices, settings: SearchSettings
) -> dict[Part, Candidate]:
    """The choice with the highest mean score over `tasks` among those that replace one part at a time.

    Sweeps over the parts until none changes, which is coordinate ascent, with duels that end as soon as they are
    decided. Exact, up to `alpha`, where parts do not interact.
    """
    rng = random.Random(settings.seed)
    order = rng.sample(list(tasks), len(tasks))
    arms = sum(len(space.candidates[part]) - 1 for part in space.parts)
    best = dict(start)
    known: dict[str, float] = {}
    beaten: set[tuple[Candidate, ...]] = set()
    for _ in range(settings.sweeps):
        before = dict(best)
        for part in rng.sample(space.parts, len(space.parts)):
            for candidate in rng.sample(space.candidates[part], len(space.candidates[part])):
                challenger = {**best, part: candidate}
                name = tuple(challenger[p] for p in space.parts)
                if candidate == best[part] or name in beaten:
                    continue
                duel = Duel(order, known, alpha=settings.alpha / max(arms, 1))
                if await _fight(duel, best, challenger, score, settings):
                    beaten.add(tuple(best[p] for p in space.parts))
                    best, known = challenger, duel.other
                else:
                    beaten.add(name)
        if best == before:
            break
    return best


async def _fight(duel: Duel, best: Choices, challenger: Choices, score: Score, settings: SearchSettings) -> bool:
    """Run a duel to its end; the tasks that decide it soonest come first. Return whether the challenger wins."""
    missing = [task for task in duel.tasks if task not in duel.best]
    duel.best.update(zip(missing, await score(best, missing), strict=True))
    failed = sum(1.0 - duel.best[task] for task in duel.tasks)
    at_random = settings.random_tasks if failed > settings.random_tasks else 0
    while True:
        verdict = duel.verdict()
        if verdict is not None:
            return verdict
        unseen = [task for task in duel.tasks if task not in duel.other]
        if not unseen:
            return duel.lead > 0
        if len(duel.other) >= at_random:
            duel.chosen_by_score = True
            unseen.sort(key=lambda task: duel.best[task])
        batch = unseen[: settings.batch_tasks]
        for task, other in zip(batch, await score(challenger, batch), strict=True):
            duel.see(task, duel.best[task], other)
