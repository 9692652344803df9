"""Task sets: typed inputs with a split, seeds, and a score for the workflow's final output."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from .errors import TaskSetError

__all__ = ["SEEDS_PER_SET", "Drawn", "Split", "Task", "TaskSet", "draw_tasks", "seed_range", "split_of"]

Split = Literal["train", "tune", "test"]


@dataclass(frozen=True)
class Task:
    """One typed input; `id` is unique within its set, `key` is what the scorer needs to judge an answer.

    >>> from pydantic import BaseModel
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> Task("sum-1", Puzzle(text="2 + 2"), key=4).key
    4
    """

    id: str
    input: BaseModel
    key: Any = None


@dataclass(frozen=True)
class TaskSet:
    """Typed inputs of one split, with `score(final_output)`.

    `scorer(task, output)` returns 0.0 to 1.0; a task counts as solved at 1.0. `seeds` is the half-open range
    of generator seeds the tasks were drawn from; splits of one source must not overlap.

    >>> from pydantic import BaseModel
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> tasks = (Task("sum-1", Puzzle(text="2 + 2"), key=4), Task("sum-2", Puzzle(text="2 + 3"), key=5))
    >>> sums = TaskSet("sums", "test", tasks, scorer=lambda task, output: float(output == task.key))
    >>> [sums.score(task, 5) for task in sums]
    [0.0, 1.0]
    """

    name: str
    split: Split
    tasks: tuple[Task, ...]
    scorer: Callable[[Task, Any], float]
    seeds: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if len({task.id for task in self.tasks}) != len(self.tasks):
            raise TaskSetError(f"task set {self.name!r} has two tasks of one id", expected="unique ids")

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def score(self, task: Task, output: Any) -> float:
        """Score a final output; a run that failed (None) scores 0.

        Raises: TaskSetError when the scorer raises or returns something outside 0..1.
        """
        if output is None:
            return 0.0
        try:
            score = float(self.scorer(task, output))
        except Exception as error:
            raise TaskSetError(
                f"the scorer of {self.name!r} raised on task {task.id!r}: {error}",
                expected="a number from 0 to 1 for any output",
                remedy="Make the scorer total: score what it cannot read as 0.",
            ) from error
        if not 0.0 <= score <= 1.0:
            raise TaskSetError(
                f"the scorer of {self.name!r} gave {score} for task {task.id!r}",
                expected="a number from 0 to 1",
            )
        return score


# Ten content buckets: 80 % of the texts train, 10 % tune, 10 % test.
_SPLIT_OF_BUCKET: tuple[Split, ...] = ("train",) * 8 + ("tune", "test")
_FIRST_SEED: dict[Split, int] = {"train": 0, "tune": 100_000_000, "test": 200_000_000}
SEEDS_PER_SET = 100_000
_SEED_LIMIT = 1_000


@dataclass(frozen=True)
class Drawn:
    """One task as drawn with a random generator: the run's input, and the key that the scorer judges answers by.

    `content` is the core of the task as text: it decides the split, and no two tasks of a set have the same.

    >>> from pydantic import BaseModel
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> Drawn("2 + 2", Puzzle(text="What is 2 + 2?"), key=4).content
    '2 + 2'
    """

    content: str
    input: BaseModel
    key: Any = None


def draw_tasks(
    name: str,
    draw: Callable[[random.Random], Drawn],
    scorer: Callable[[Task, Any], float],
    *,
    split: Split,
    size: int,
    seed: int = 0,
) -> TaskSet:
    """Draw `size` different tasks of one split; `scorer(task, output)` gives 0.0 to 1.0.

    `draw` gets a generator of its own for every task, so that a task depends on its seed alone. Splits are disjoint
    twice: each has a range of seeds of its own, and keeps only tasks whose content falls in it (about 80/10/10).

    Raises: TaskSetError when size or seed is out of range, or `draw` runs out of different tasks.

    >>> from pydantic import BaseModel
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> def draw(random):
    ...     a, b = random.randint(1, 99), random.randint(1, 99)
    ...     return Drawn(f"{a} + {b}", Puzzle(text=f"What is {a} + {b}?"), key=a + b)
    >>> tasks = draw_tasks("sums", draw, lambda task, output: float(output == task.key), split="test", size=8)
    >>> len(tasks), tasks.score(tasks.tasks[0], tasks.tasks[0].key)
    (8, 1.0)
    """
    first, limit = seed_range(name, split, size, seed)
    tasks: list[Task] = []
    seen: set[str] = set()
    drawn = 0
    while len(tasks) < size and drawn < limit:
        one = draw(random.Random(first + drawn))
        drawn += 1
        if one.content in seen or split_of(one.content) != split:
            continue
        seen.add(one.content)
        tasks.append(Task(id=f"{name}-{first + drawn - 1}", input=one.input, key=one.key))
    if len(tasks) < size:
        raise TaskSetError(
            f"{name!r} drew only {len(tasks)} different tasks of split {split!r}",
            expected=f"{size}",
            remedy="Ask for fewer, or let `draw` vary more.",
        )
    return TaskSet(name, split, tuple(tasks), scorer, (first, first + drawn))


def seed_range(name: str, split: Split, size: int, seed: int) -> tuple[int, int]:
    """The first seed of a set, and how many may be tried for its tasks.

    Raises: TaskSetError when size or seed is out of range.
    """
    if size < 1 or not 0 <= seed < _SEED_LIMIT:
        raise TaskSetError(
            f"{name!r} was asked for size={size}, seed={seed}",
            expected=f"size of at least 1 and a seed from 0 to {_SEED_LIMIT - 1}",
        )
    return _FIRST_SEED[split] + seed * SEEDS_PER_SET, min(SEEDS_PER_SET, 200 * size + 2_000)


def split_of(text: str) -> Split:
    """Say which split a text belongs to, by its content alone (about 80/10/10).

    Seeds alone do not keep splits apart: a small generator repeats itself under different seeds.
    """
    return _SPLIT_OF_BUCKET[hashlib.sha256(text.strip().encode()).digest()[0] % len(_SPLIT_OF_BUCKET)]
