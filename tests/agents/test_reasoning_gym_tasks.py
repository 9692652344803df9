"""Task sets from reasoning-gym: disjoint splits, scorers that never raise, errors that name the remedy."""

from __future__ import annotations

import sys

import pytest
from pydantic import BaseModel

from metier.agents import TaskSetError
from metier.agents.reasoning_gym_tasks import mix_tasks, reasoning_gym_tasks
from metier.agents.tasksets import Split, split_of

pytest.importorskip("reasoning_gym")

SPLITS: tuple[Split, ...] = ("train", "tune", "test")
KNOBS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


class Puzzle(BaseModel):
    text: str


class Working(BaseModel):
    steps: str
    value: int


def test_a_small_generator_leaks_no_question_into_another_split() -> None:
    # 200 different questions in all: without the content rule every seed range would repeat them.
    questions = {
        split: {
            task.input.text
            for task in reasoning_gym_tasks("chain_sum", split=split, size=8, input_type=Puzzle, **KNOBS)
        }
        for split in SPLITS
    }
    assert all(len(found) == 8 for found in questions.values())
    assert not questions["train"] & questions["tune"]
    assert not (questions["train"] | questions["tune"]) & questions["test"]


def test_seeds_of_splits_do_not_overlap_and_repeat_the_same_tasks() -> None:
    sets = [
        reasoning_gym_tasks("leg_counting", split=split, size=5, input_type=Puzzle, seed=seed)
        for split in SPLITS
        for seed in (0, 999)
    ]
    ranges = sorted(s.seeds for s in sets)
    assert all(first[1] <= second[0] for first, second in zip(ranges, ranges[1:], strict=False))
    again = reasoning_gym_tasks("leg_counting", split="train", size=5, input_type=Puzzle)
    assert [t.input for t in again] == [t.input for t in sets[0]]
    assert [t.id for t in again] == [t.id for t in sets[0]]


def test_content_may_be_more_than_the_wording() -> None:
    tasks = reasoning_gym_tasks(
        "chain_sum",
        split="tune",
        size=6,
        input_type=Puzzle,
        content=lambda entry: entry["metadata"]["expression"],
        **KNOBS,
    )
    assert all(split_of(task.key["metadata"]["expression"]) == "tune" for task in tasks)


def test_entries_can_be_turned_down() -> None:
    tasks = reasoning_gym_tasks(
        "chain_sum",
        split="train",
        size=6,
        input_type=Puzzle,
        keep=lambda entry: int(entry["answer"]) < 0,
        **KNOBS,
    )
    assert all(int(task.key["answer"]) < 0 for task in tasks)


def test_about_four_fifths_of_all_texts_train() -> None:
    found = [split_of(f"question {i}") for i in range(2000)]
    assert 0.75 < found.count("train") / 2000 < 0.85
    assert 0.07 < found.count("test") / 2000 < 0.13
    assert split_of(" question 1 ") == split_of("question 1")


def test_the_verifier_scores_text_numbers_and_models() -> None:
    tasks = reasoning_gym_tasks("chain_sum", split="test", size=4, input_type=Puzzle, **KNOBS)
    for task in tasks:
        answer = task.key["answer"]
        assert tasks.score(task, f" {answer} ") == tasks.score(task, int(answer)) == 1.0
        assert tasks.score(task, Working(steps="…", value=int(answer))) == 1.0
        assert tasks.score(task, Working(steps=answer, value=int(answer) + 1)) == 0.0
        assert tasks.score(task, "zzz") == tasks.score(task, "") == tasks.score(task, None) == 0.0
    by_steps = reasoning_gym_tasks("chain_sum", split="test", size=4, input_type=Puzzle, answer_field="steps", **KNOBS)
    first = by_steps.tasks[0]
    assert by_steps.score(first, Working(steps=first.key["answer"], value=99)) == 1.0


def test_a_verifier_that_raises_on_junk_scores_it_nothing() -> None:
    tasks = reasoning_gym_tasks("prime_factorization", split="train", size=2, input_type=Puzzle)
    assert all(tasks.score(task, "no factors at all") == 0.0 for task in tasks)
    assert all(tasks.score(task, task.key["answer"]) == 1.0 for task in tasks)


def test_mixed_sets_keep_their_scorers() -> None:
    sums = reasoning_gym_tasks("chain_sum", split="tune", size=3, input_type=Puzzle, **KNOBS)
    legs = reasoning_gym_tasks("leg_counting", split="tune", size=2, input_type=Puzzle)
    mixed = mix_tasks("both", sums, legs)
    assert [t.id.split("-")[0] for t in mixed] == [
        "chain_sum",
        "leg_counting",
        "chain_sum",
        "leg_counting",
        "chain_sum",
    ]
    assert all(mixed.score(task, task.key["answer"]) == 1.0 for task in mixed)
    other = reasoning_gym_tasks("leg_counting", split="test", size=2, input_type=Puzzle)
    with pytest.raises(TaskSetError, match="expected task sets of one split"):
        mix_tasks("both", sums, other)


class Two(BaseModel):
    text: str
    other: str


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(TaskSetError, match=r"no dataset 'chain_sun'.*Did you mean 'chain_sum'"):
        reasoning_gym_tasks("chain_sun", split="train", size=1, input_type=Puzzle)
    with pytest.raises(TaskSetError, match="refuses 'chain_sum'.*min_term"):
        reasoning_gym_tasks("chain_sum", split="train", size=1, input_type=Puzzle, min_term=2)
    with pytest.raises(TaskSetError, match="refuses 'chain_sum'"):
        reasoning_gym_tasks("chain_sum", split="train", size=1, input_type=Puzzle, min_terms=-1)
    with pytest.raises(TaskSetError, match=r"only \d+ different questions in split 'test'.*Ask for fewer"):
        reasoning_gym_tasks("chain_sum", split="test", size=100, input_type=Puzzle, **KNOBS)
    with pytest.raises(TaskSetError, match="Two has the fields text, other"):
        reasoning_gym_tasks("chain_sum", split="train", size=1, input_type=Two)
    with pytest.raises(TaskSetError, match="size=0"):
        reasoning_gym_tasks("chain_sum", split="train", size=0, input_type=Puzzle)
    with pytest.raises(TaskSetError, match="seed=1000"):
        reasoning_gym_tasks("chain_sum", split="train", size=1, input_type=Puzzle, seed=1000)


def test_without_reasoning_gym_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TaskSetError, match=r"pip install 'metier\[eval\]'"):
        reasoning_gym_tasks("chain_sum", split="train", size=1, input_type=Puzzle)
