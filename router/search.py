"""Find the assignment that solves most, with few runs: duels that end as soon as they are decided."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from ..agents.errors import ProfileError
from .intervals import mean, upper_bound
from .space import Candidate, Choices, Part, Space

__all__ = ["Duel", "Score", "SearchSettings", "find_best", "find_start"]

Score = Callable[[Choices, Sequence[str]], Awaitable[list[float]]]
"""Scores of tasks under a choice, in their order."""


class SearchSettings(BaseModel):
    """`alpha` is the chance that any duel of a sweep is lost to bad luck alone; duels go `batch_tasks` tasks at a time.

    After `random_tasks` tasks in random order those come first that the better choice failed. At most `start_tries`
    choices are looked at for one that solves anything; at most `sweeps` rounds over all parts are made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float = Field(default=0.05, gt=0, lt=1)
    batch_tasks: int = Field(default=1, ge=1)
    random_tasks: int = Field(default=12, ge=0)
    start_tasks: int = Field(default=4, ge=1)
    start_tries: int = Field(default=32, ge=1)
    sweeps: int = Field(default=8, ge=1)
    seed: int = 0


@dataclass
class Duel:
    """Two choices on the same tasks; `best` and `other` are the scores known so far, by task.

    Ends early without any doubt when the tasks not seen cannot change who has more in total, or with a small chance
    of error when a bound on the difference of means, valid at every look, is past 0.
    """

    tasks: Sequence[str]
    best: dict[str, float]
    other: dict[str, float] = field(default_factory=dict)
    alpha: float = 0.05
    _random: list[float] = field(default_factory=list)
    # Only tasks met in random order say something about the mean; those chosen by score do not.
    chosen_by_score: bool = False

    def see(self, task: str, best: float, other: float) -> None:
        """Take note of both scores on one task."""
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


async def find_start(
    space: Space, tasks: Sequence[str], score: Score, settings: SearchSettings
) -> dict[Part, Candidate]:
    """A choice that solves something: where every run fails, replacing one role at a time says nothing.

    Tried are each candidate in every part, then random choices. Raises: ProfileError when none solves anything.
    """
    rng = random.Random(settings.seed)
    tried = [space.uniform(candidate) for candidate in space.everywhere()]
    few = tasks[: settings.start_tasks]
    for number in range(settings.start_tries):
        if number < len(tried):
            choices = tried[number]
        else:
            choices = {part: rng.choice(space.candidates[part]) for part in space.parts}
        if mean(await score(choices, few)) > 0:
            return choices
    raise ProfileError(
        f"none of {settings.start_tries} assignments solves any of {len(few)} tasks",
        expected="one that solves something, to measure the others by",
        remedy="Name one with --incumbent, add variants, or give more tasks.",
    )


async def find_best(
    space: Space, tasks: Sequence[str], score: Score, start: Choices, settings: SearchSettings
) -> dict[Part, Candidate]:
    """The choice with the highest mean score over `tasks` among those that replace one part at a time.

    Sweeps over the parts until none changes, which is coordinate ascent, with duels that end as soon as they are
    decided. Exact for parts that do not hinder each other, up to `alpha`.
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
    """Play a duel to its end; the tasks that decide it soonest come first once enough are seen in random order."""
    while True:
        verdict = duel.verdict()
        if verdict is not None:
            return verdict
        unseen = [task for task in duel.tasks if task not in duel.other]
        if not unseen:
            return duel.lead > 0
        if len(duel.other) >= settings.random_tasks:
            duel.chosen_by_score = True
            unseen.sort(key=lambda task: duel.best.get(task, 0.5))
        batch = unseen[: settings.batch_tasks]
        ours = await _known(duel.best, best, batch, score)
        theirs = await score(challenger, batch)
        for task, one, other in zip(batch, ours, theirs, strict=True):
            duel.see(task, one, other)


async def _known(scores: Mapping[str, float], choices: Choices, tasks: Sequence[str], score: Score) -> list[float]:
    missing = [task for task in tasks if task not in scores]
    found = dict(zip(missing, await score(choices, missing), strict=True)) if missing else {}
    return [found[task] if task in found else scores[task] for task in tasks]
