"""Ways to search for the best assignment: ours, coordinate ascent, chance, brute force."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import anyio
from outcome_table import Cast, Meter, Table

from metier.router import Assignment, Candidate, Evaluator, Journal, Outcome, Part, Space
from metier.router.probing.evaluator import OnOutcome
from metier.router.probing.search import SearchSettings, explore, find_best

CLOSE = 0.99
Method = Callable[[Table, Meter, int], Cast]


def ours(table: Table, meter: Meter, seed: int) -> Cast:
    """`explore` and `find_best`, as `metier probe` without an incumbent; one task at a time."""
    rng = random.Random(seed)
    parts = tuple(Part(role) for role in table.roles)
    variants = [Candidate(v) for v in rng.sample(table.variants, len(table.variants))]
    space = Space(parts, {part: tuple(variants) for part in parts}, dict.fromkeys(table.roles, 1))
    order = {table.tasks[i]: i for i in rng.sample(range(len(table.tasks)), len(table.tasks))}

    async def run(assignment: Assignment, tasks: Sequence[str], on_outcome: OnOutcome) -> None:
        cast = tuple(assignment.roles[role].variant for role in table.roles)
        for task in tasks:
            on_outcome(Outcome(key="", task=task, score=meter.score(cast, order[task])))

    async def search() -> Cast:
        evaluator = Evaluator(space, {task: task for task in order}, run, Journal(None, Outcome))
        settings = SearchSettings(seed=seed)
        start = await explore(space, list(order), evaluator.scores, settings)
        best = await find_best(space, list(order), evaluator.scores, start, settings)
        return tuple(best[part].variant for part in parts)

    return anyio.run(search)


def coordinate_ascent(table: Table, meter: Meter, seed: int) -> Cast:
    """One role after the other: each candidate on every task, the best stays; until nothing changes."""
    rng = random.Random(seed)
    best = tuple(rng.choice(table.variants) for _ in table.roles)

    def mean(cast: Cast) -> float:
        return sum(meter.score(cast, task) for task in range(len(table.tasks)))

    while True:
        before = best
        for place in rng.sample(range(len(table.roles)), len(table.roles)):
            tried = [(*best[:place], v, *best[place + 1 :]) for v in table.variants]
            best = max(tried, key=lambda cast: (mean(cast), cast == best))
        if best == before:
            return best


def chance(table: Table, meter: Meter, seed: int) -> Cast:
    """Random assignments on every task, stopped by an oracle once one is within 1 %: a bound no real one reaches."""
    casts = table.casts
    random.Random(seed).shuffle(casts)
    for cast in casts:
        for task in range(len(table.tasks)):
            meter.score(cast, task)
        if table.mean(cast) >= CLOSE * table.best:
            return cast
    raise AssertionError("unreachable: the best assignment is among them")


def brute_force(table: Table, meter: Meter, seed: int) -> Cast:
    """Every assignment on every task."""
    return max(table.casts, key=lambda cast: sum(meter.score(cast, task) for task in range(len(table.tasks))))


METHODS: dict[str, Method] = {
    "ours": ours,
    "coordinate ascent": coordinate_ascent,
    "random, stopped by an oracle": chance,
    "brute force": brute_force,
}
