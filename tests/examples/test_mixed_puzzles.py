"""The mixed puzzles: clean splits, right teachers, prompts as a run asks them, whole shipped variants."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from metier.agents import Ask, ScriptedBackend
from metier.agents.answers.answers import parse_answer
from metier.agents.prompts import prompt_layout, task_text
from metier.agents.traffic import data_fingerprint
from metier.router import load_assignment
from metier.runtime import open_session
from metier.specializers import Shelf, load_recipe
from metier.specializers.recipes.recipe import read_rows

pytest.importorskip("reasoning_gym")
EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = {"mixed-trex": "trex.yaml", "mixed-checker": "mixed_checker.yaml"}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example's file by name, as `metier run` does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("mixed_puzzles", "mixed_team"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def test_no_question_is_in_two_splits_and_kinds_take_turns(example: Any) -> None:
    puzzles = example("mixed_puzzles")
    kinds = list(puzzles.KINDS)
    assert len(kinds) >= 6
    seen = {split: [t.input.text for t in puzzles.mixed_tasks(split, 160)] for split in ("train", "tune", "test")}
    assert all(len(set(texts)) == 160 for texts in seen.values())
    assert not set(seen["train"]) & set(seen["tune"])
    assert not (set(seen["train"]) | set(seen["tune"])) & set(seen["test"])
    assert [puzzles.kind_of(t) for t in puzzles.mixed_tasks("test", 16)] == kinds * 2


def test_teachers_give_answers_that_score_and_tasks_that_serving_will_see(example: Any) -> None:
    puzzles = example("mixed_puzzles")
    tasks = puzzles.mixed_tasks("train", 80, seed=2)
    rows = list(puzzles.rows(80, 2))
    for task, row in zip(tasks, rows, strict=True):
        answer = parse_answer(row.reply, puzzles.Answer)
        assert tasks.score(task, answer) == 1.0
        assert tasks.score(task, puzzles.Answer(answer=answer.answer + " or not")) == 0.0
        assert row.task == task_text(task.input) == task.input.text
    for number, kind in enumerate(puzzles.KINDS):
        of_kind = list(puzzles.kind_rows(kind, 10, 2))
        assert of_kind == rows[number :: len(puzzles.KINDS)]


def test_the_checker_is_taught_to_compare(example: Any) -> None:
    puzzles = example("mixed_puzzles")
    rows = list(puzzles.checker_rows(200, 3))
    right = 0
    for row in rows:
        verdict = parse_answer(row.reply, puzzles.Verdict)
        given = row.messages[1].content.split("# answer\n")[1].split("\n\n# Your step")[0]
        assert verdict.correct == (given == verdict.own)
        right += verdict.correct
    assert 70 < right < 130


@pytest.mark.anyio
async def test_the_team_asks_what_training_showed(example: Any, tmp_path: Path) -> None:
    puzzles, team = example("mixed_puzzles"), example("mixed_team")
    task = puzzles.mixed_tasks("test", 1).tasks[0]
    answer = puzzles.Answer(answer=task.key["answer"])

    def reply(ask: Ask) -> object:
        return answer if ask.role == "solver" else puzzles.Verdict(own=answer.answer, correct=True)

    backend = ScriptedBackend(default=reply)
    assignment = load_assignment(EXAMPLES / "mixed_assignment.yaml")
    async with open_session(backend=backend, assignment=assignment, store=tmp_path / "runs.sqlite") as session:
        result = await session.run(team.graph, task.input)
    assert result == team.Result(trusted=True, answer=answer.answer)
    assert team.tasks("test", 1).score(task, result) == 1.0
    assert [ask.variant for ask in backend.asks] == ["mixed-trex", "mixed-checker"]
    assert backend.asks[0].messages == puzzles.teach(task).messages
    assert {ask.task for ask in backend.asks} == {puzzles.teach(task).task}


@pytest.mark.parametrize("name", list(SHIPPED))
def test_shipped_variants_are_whole_small_and_made_from_their_recipes(example: Any, name: str) -> None:
    shelf = Shelf(EXAMPLES / "none", also=[EXAMPLES / "variants"])
    variant = shelf.get(name)
    shelf.verify(variant)
    puzzles = example("mixed_puzzles")
    assert {prompt_layout(role.gives) for role in (puzzles.solver, puzzles.checker)} == {variant.prompt_layout}
    weights = shelf.path(variant) / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_size <= 5_000_000
    recipe = load_recipe(EXAMPLES / "recipes" / SHIPPED[name])
    assert variant.recipe == recipe.model_dump(mode="json")
    assert variant.data == data_fingerprint(read_rows(recipe))
