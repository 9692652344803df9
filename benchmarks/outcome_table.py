"""What every assignment scored on every task: recorded once, looked up by searches, which are charged for each look."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cast = tuple[str, ...]
SYNTHETIC = "synthetic: made by a formula, nothing was measured"


@dataclass
class Table:
    """What every assignment scored on every task, and which asks each run made (equal asks have equal numbers)."""

    name: str
    roles: tuple[str, ...]
    variants: tuple[str, ...]
    tasks: tuple[str, ...]
    scores: dict[Cast, list[float]]
    asks: dict[Cast, list[list[int]]]

    @property
    def casts(self) -> list[Cast]:
        """Every assignment."""
        return list(itertools.product(self.variants, repeat=len(self.roles)))

    def mean(self, cast: Cast) -> float:
        """Score of an assignment over the whole table."""
        return sum(self.scores[cast]) / len(self.tasks)

    @property
    def best(self) -> float:
        """Score of the best assignment."""
        return max(map(self.mean, self.casts))

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "name": self.name, "roles": self.roles, "variants": self.variants, "tasks": self.tasks,
            "runs": [{"cast": c, "scores": self.scores[c], "asks": self.asks[c]} for c in self.casts],
        }  # fmt: skip
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read what `write` has written."""
        record = json.loads(path.read_text(encoding="utf-8"))
        runs = {tuple(run["cast"]): run for run in record["runs"]}
        return cls(
            record["name"],
            tuple(record["roles"]),
            tuple(record["variants"]),
            tuple(record["tasks"]),
            {cast: run["scores"] for cast, run in runs.items()},
            {cast: run["asks"] for cast, run in runs.items()},
        )


def synthetic_table(seed: int = 0, tasks: int = 50, best: tuple[float, float] = (0.85, 0.97)) -> Table:
    """Three roles in a row, four candidates each, by formula: a task is solved when all three roles manage it.

    Each candidate manages a random share of tasks, its own role's favourite most of them; hard tasks are hard for all.
    """
    rng = random.Random(seed)
    roles, variants = ("planner", "solver", "critic"), ("base", "planner", "solver", "critic")
    skill = {(r, v): rng.uniform(*best) if r == v else rng.uniform(0.05, 0.85) for r in roles for v in variants}
    hardness = [rng.random() for _ in range(tasks)]
    able = {
        (r, v): [0.6 * hardness[t] + 0.4 * rng.random() < skill[r, v] for t in range(tasks)]
        for r in roles
        for v in variants
    }
    numbers: dict[tuple[Any, ...], int] = {}
    scores, asks = {}, {}
    for cast in itertools.product(variants, repeat=3):
        scores[cast] = [float(all(able[r, v][t] for r, v in zip(roles, cast, strict=True))) for t in range(tasks)]
        asks[cast] = [
            [
                # What a role is asked depends on whether those before it were right.
                numbers.setdefault((t, i, cast[i], *(able[roles[j], cast[j]][t] for j in range(i))), len(numbers))
                for i in range(3)
            ]
            for t in range(tasks)
        ]
    return Table(SYNTHETIC, roles, variants, tuple(map(str, range(tasks))), scores, asks)


@dataclass
class Meter:
    """Counts evaluations of a table, and asks with equal ones reused."""

    table: Table
    seen: set[tuple[Cast, int]] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)

    def score(self, cast: Cast, task: int) -> float:
        """The score of one run, counted when it is new."""
        self.seen.add((cast, task))
        self.asked.update(self.table.asks[cast][task])
        return self.table.scores[cast][task]
