"""Puzzles of several kinds for one solver: what a mixture of experts is for, and a hard mixture for one LoRA.

Every kind is a reasoning-gym dataset at a small setting: short questions, short answers, exact scores. The
solver's prompt does not name the kind: the kind shows in the puzzle's own words only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from metier.agents import (
    Role,
    Split,
    Task,
    TaskSet,
    TrafficRow,
    mix_tasks,
    reasoning_gym_tasks,
    render_prompt,
    task_text,
)


class Puzzle(BaseModel):
    text: str


class Answer(BaseModel):
    answer: str


class Verdict(BaseModel):
    own: str
    correct: bool


solver = Role("solver", takes=Puzzle, gives=Answer, instructions="Solve the puzzle.", max_tokens=40)
checker = Role(
    "checker",
    takes=(Puzzle, Answer),
    gives=Verdict,
    instructions="Solve the puzzle yourself. Is the answer right?",
    max_tokens=48,
)

KINDS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 3, "max_words": 5},
    "spell_backward": {"min_word_len": 3, "max_word_len": 4},
    "family_relationships": {},
    "number_filtering": {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 1, "max_value": 99},
    "gcd": {"min_value": 2, "max_value": 60},
    "syllogism": {},
    "word_sequence_reversal": {"min_words": 3, "max_words": 4},
}
"""Kind → its generator's knobs, small enough for a model of 135M parameters to learn something of each."""


def kind_tasks(kind: str, split: Split, size: int, seed: int = 0) -> TaskSet:
    """Different puzzles of one kind; splits share no question."""
    return reasoning_gym_tasks(kind, split=split, size=size, input_type=Puzzle, seed=seed, **KINDS[kind])


def mixed_tasks(split: Split, size: int, seed: int = 0) -> TaskSet:
    """All kinds in equal parts, taking turns; the first puzzles of every kind are those of `kind_tasks`."""
    each = -(-size // len(KINDS))
    mixed = mix_tasks("mixed-puzzles", *(kind_tasks(kind, split, each, seed) for kind in KINDS))
    return TaskSet(mixed.name, split, mixed.tasks[:size], mixed.scorer, mixed.seeds)


def kind_of(task: Task) -> str:
    """The kind a task belongs to."""
    return task.id.rpartition("-")[0]


def teach(task: Task) -> TrafficRow:
    """The right answer to a puzzle as a training row: the prompt is what a run asks, the reply the generator's."""
    return TrafficRow(
        role=solver.name,
        messages=render_prompt(solver, {"puzzle": task.input}),
        reply=Answer(answer=str(task.key["answer"])).model_dump_json(),
        score=1.0,
        task=task_text(task.input),
    )


def rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Answered puzzles of all kinds, taking turns."""
    return map(teach, mixed_tasks(split, size, seed))


def kind_rows(kind: str, size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Answered puzzles of one kind: the same ones that `rows` mixes in."""
    return map(teach, kind_tasks(kind, split, size, seed))


def checker_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Right answers and wrong ones, half and half; a wrong one is the right answer to another puzzle of the kind.

    The checker writes its own answer before it judges, so that it has two texts to compare.
    """
    rng = random.Random(seed)
    tasks = list(mixed_tasks(split, size, seed))
    answers = {kind: [task.key["answer"] for task in tasks if kind_of(task) == kind] for kind in KINDS}
    for task in tasks:
        right = str(task.key["answer"])
        others = [answer for answer in answers[kind_of(task)] if answer != right]
        given = right if rng.random() < 0.5 or not others else str(rng.choice(others))
        yield TrafficRow(
            role=checker.name,
            messages=render_prompt(checker, {"puzzle": task.input, "answer": Answer(answer=given)}),
            reply=Verdict(own=right, correct=given == right).model_dump_json(),
            score=1.0,
            task=task_text(task.input),
        )
