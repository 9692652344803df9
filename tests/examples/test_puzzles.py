"""The teachers of the demo's roles are right, their splits are clean, and the shipped variants are whole."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.agents.answers.answers import parse_answer
from metier.agents.prompts import prompt_layout
from metier.agents.traffic import data_fingerprint
from metier.specializers import Shelf, load_recipe
from metier.specializers.recipes.recipe import read_rows

pytest.importorskip("reasoning_gym")
EXAMPLES = Path(__file__).parents[2] / "examples"


def load_puzzles() -> Any:
    spec = importlib.util.spec_from_file_location("puzzles_under_test", EXAMPLES / "puzzles.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves its annotations there
    spec.loader.exec_module(module)
    return module


puzzles = load_puzzles()
SIGNED = st.tuples(st.sampled_from((1, -1)), st.lists(st.integers(0, 99), min_size=1, max_size=3))
TERMS = st.lists(SIGNED, min_size=1, max_size=4)


@given(TERMS)
def test_expressions_mean_what_python_says(terms: Any) -> None:
    text = puzzles.write_terms(terms)
    value = eval(text)
    assert puzzles.read_terms(text) == terms
    assert puzzles.evaluate(terms) == value
    assert eval(puzzles.write_terms(puzzles.reorder(terms))) == value
    answer = puzzles.work_out(terms)
    assert answer.value == value
    assert all(eval(line) == value for line in answer.steps.split("=") if line)


@given(TERMS.filter(lambda terms: len(terms) + len(terms[0][1]) > 2), st.integers(0, 1000))
def test_mistakes_are_mistakes(terms: Any, seed: int) -> None:
    answer = puzzles.plausible_mistake(terms, random.Random(seed))
    assert answer.value != puzzles.evaluate(terms)


def test_no_expression_is_in_two_splits() -> None:
    seen = {
        split: {puzzles.write_terms(puzzles.right_terms(task.key)) for task in puzzles.puzzle_tasks(split, 120)}
        for split in ("train", "tune", "test")
    }
    assert not seen["train"] & seen["tune"]
    assert not (seen["train"] | seen["tune"]) & seen["test"]


def test_puzzles_mix_three_kinds_and_score_their_answers() -> None:
    tasks = puzzles.puzzle_tasks("test", 20)
    assert len(tasks) == 20
    assert [task.id.split("-")[0] for task in tasks][:3] == ["leg_counting", "chain_sum", "basic_arithmetic"]
    for task in tasks:
        right = puzzles.work_out(puzzles.right_terms(task.key))
        assert tasks.score(task, right) == 1.0
        assert tasks.score(task, puzzles.Answer(steps=right.steps, value=right.value + 1)) == 0.0


def test_teachers_write_what_the_roles_give() -> None:
    critic_says: list[bool] = []
    second_rounds = 0
    for role, rows_of in (
        (puzzles.planner, puzzles.planner_rows),
        (puzzles.solver, puzzles.solver_rows),
        (puzzles.critic, puzzles.critic_rows),
    ):
        rows = list(rows_of(size=90, seed=3))
        assert len(rows) == 90
        assert rows == list(rows_of(size=90, seed=3))
        for row in rows:
            answer = parse_answer(row.reply, role.gives)
            assert row.reply == answer.model_dump_json()
            assert row.role == role.name
            second_rounds += row.messages[1].content.count("# verdict")
            if role is puzzles.critic:
                critic_says.append(answer.correct)
                given_value = int(row.messages[1].content.split("value: ")[1].split("\n")[0])
                assert answer.correct == (eval(answer.why.split("=")[0]) == given_value)
    assert 20 < second_rounds < 45
    assert 30 < sum(critic_says) < 60


@pytest.mark.parametrize("name", ["planner", "solver", "critic"])
def test_shipped_variants_are_whole_small_and_made_from_their_recipes(name: str) -> None:
    shelf = Shelf(EXAMPLES / "none", also=[EXAMPLES / "variants"])
    variant = shelf.get(name)
    shelf.verify(variant)
    assert variant.prompt_layout == prompt_layout(getattr(puzzles, name).gives)
    weights = shelf.path(variant) / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_size <= 5_000_000
    recipe = load_recipe(EXAMPLES / "recipes" / f"{name}.yaml")
    assert variant.recipe == recipe.model_dump(mode="json")
    assert variant.data == data_fingerprint(read_rows(recipe))
    assert variant.card["tune_accuracy_after"] > variant.card["tune_accuracy_before"]
