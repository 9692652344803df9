"""Task sets: typed inputs with a split, seeds, and a score for the workflow's final output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from .errors import TaskSetError

__all__ = ["Split", "Task", "TaskSet"]

Split = Literal["train", "tune", "test"]


@dataclass(frozen=True)
class Task:
    """One typed input; `id` is unique within its set, `key` is whatever the scorer needs to judge an answer."""

    id: str
    input: BaseModel
    key: Any = None


@dataclass(frozen=True)
class TaskSet:
    """Typed inputs of one split, with `score(final_output)`.

    `scorer(task, output)` returns 0.0 to 1.0; a task counts as solved at 1.0. `seeds` is the half-open range
    of generator seeds the tasks were drawn from; splits of one source must not overlap.
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
