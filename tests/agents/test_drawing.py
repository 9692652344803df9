"""Tasks drawn by a program: every split its own, the same again from the same seed, errors that name the remedy."""

from __future__ import annotations

import random

import pytest
from pydantic import BaseModel

from metier.agents import TaskSetError
from metier.agents.tasksets import Drawn, Split, Task, TaskSet, draw_tasks, split_of

SPLITS: tuple[Split, ...] = ("train", "tune", "test")


class Sum(BaseModel):
    text: str


def draw_sum(rng: random.Random) -> Drawn:
    """A sum whose wording varies more than its content."""
    a, b = rng.randint(0, 30), rng.randint(0, 30)
    return Drawn(f"{a}+{b}", Sum(text=rng.choice(("{}+{}", "{} and {}")).format(a, b)), a + b)


def score(task: Task, output: object) -> float:
    return float(output == task.key)


def sums(split: Split, size: int, seed: int = 0) -> TaskSet:
    return draw_tasks("sums", draw_sum, score, split=split, size=size, seed=seed)


def test_splits_share_no_content_and_no_seed() -> None:
    sets = {split: sums(split, 40) for split in SPLITS}
    for split, tasks in sets.items():
        cores = [task.input.text.replace(" and ", "+") for task in tasks]
        assert len(set(cores)) == 40
        assert {split_of(core) for core in cores} == {split}
    ranges = sorted(tasks.seeds for tasks in sets.values())
    assert all(one[1] <= other[0] for one, other in zip(ranges, ranges[1:], strict=False))


def test_a_task_depends_on_its_seed_alone() -> None:
    few, many = sums("tune", 5, seed=3), sums("tune", 25, seed=3)
    assert many.tasks[:5] == few.tasks
    assert sums("tune", 5, seed=4).tasks != few.tasks
    assert few.score(few.tasks[0], few.tasks[0].key) == 1.0


@pytest.mark.parametrize(("size", "seed"), [(0, 0), (1, -1), (1, 1_000)])
def test_sizes_and_seeds_out_of_range_are_refused(size: int, seed: int) -> None:
    with pytest.raises(TaskSetError, match="at least 1 and a seed from 0 to 999"):
        sums("train", size, seed)


def test_a_program_that_runs_out_is_named() -> None:
    with pytest.raises(TaskSetError, match=r"drew only \d+ different tasks of split 'test'"):
        sums("test", 400)
