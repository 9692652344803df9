"""The methods that ask a served variant: the sweep over budgets, and training on the shortest correct thoughts."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from metier.agents import Ask, Message, ScriptedBackend, TrafficRow, write_traffic
from metier.agents.errors import RecipeError, TrainingError
from metier.agents.messages import Reply, Usage
from metier.agents.thinking import ThinkingProfile
from metier.specializers import Recipe, Shelf, Variant, produce
from metier.specializers.methods.thinking.shortest_correct import shortest_correct

LORA = {"rank": 2, "alpha": 4, "steps": 2, "batch_rows": 4, "warmup_steps": 0}
SWEEP = {"method": "thinking", "role": "roles.py:adder", "budgets": [0, 2, 4, 8], "also": ["base"]}
SHORTEST = {"method": "shortest_correct", "role": "roles.py:adder", "samples": 3, "budget_tokens": 9, **LORA}
PROGRAM = """
from pydantic import BaseModel
from metier.agents import Role

class Number(BaseModel):
    value: int

adder = Role("adder", takes={"sum": str}, gives=Number, max_tokens=9)
"""


class Engines:
    """A backend that plays a shelf by a script, and keeps what it was asked."""

    def __init__(self, answer: Callable[[Ask], str]) -> None:
        self.answer = answer
        self.asked: list[Ask] = []

    @asynccontextmanager
    async def __call__(self, shelf: Shelf) -> AsyncGenerator[ScriptedBackend]:
        backend = ScriptedBackend({"adder": self.answer})
        yield backend
        self.asked += backend.asks


def by_budget(ask: Ask) -> str:
    """The base never knows; the variant is right once it may think four words."""
    assert ask.thinking is not None
    right = ask.variant is not None and ask.thinking.max_tokens >= 4
    return f'<think>two and two and more</think>{{"value":{4 if right else 5}}}'


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a role, rows of it, and a shelf with a variant trained on them."""
    folder = tmp_path_factory.mktemp("adder")
    (folder / "roles.py").write_text(PROGRAM)
    asked = (Message(role="user", content="2+2"),)
    rows = [
        TrafficRow(role="adder", messages=asked, reply='{"value":4}', thinking=thinking, score=1.0)
        for thinking in ["two and two make four"] * 6 + [""] * 2
    ]
    write_traffic(folder / "rows.jsonl", rows)
    make(folder, tiny_base, Shelf(folder / "shelf"), {"method": "lora", **LORA}, None, name="adder", parent="base")
    return folder


@pytest.fixture
def shelf(tmp_path: Path, prepared: Path) -> Shelf:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def adder(shelf: Shelf) -> Variant:
    return shelf.get("adder")


def make(folder: Path, base: Path, shelf: Shelf, method: Any, engines: Engines | None, **fields: Any) -> Variant:
    given = {"name": "tuned", "parent": "adder", "data": {"traffic": "rows.jsonl"}, "methods": [method], **fields}
    return produce(Recipe.model_validate({**given, "folder": folder}), shelf=shelf, base=base, open_backend=engines)


def test_a_sweep_gives_the_variant_its_budget_and_the_card_its_curves(
    tmp_path: Path, tiny_base: Path, shelf: Shelf, adder: Variant
) -> None:
    engines = Engines(by_budget)
    tuned = make(tmp_path, tiny_base, shelf, SWEEP, engines)
    assert tuned.ask == adder.ask.model_copy(update={"thinking": ThinkingProfile(max_tokens=4)})
    files = {name: hash for name, hash in tuned.files.items() if name.startswith("adapter/")}
    assert files == {name: hash for name, hash in adder.files.items() if name.startswith("adapter/")}
    card = tuned.card
    assert (card["role"], card["asks"], card["thinking_budget"], card["thinking_quality"]) == ("adder", 8, 4, 1.0)
    points = card["thinking"]["points"]
    assert [(p["variant"], p["budget_tokens"]) for p in points] == [
        (v, b) for v in ("adder", "base") for b in (0, 2, 4, 8)
    ]
    assert [p["used_tokens"] for p in points[:4]] == [0, 2, 4, 5]
    assert card["thinking"]["curves"]["base"]["ceiling"] == 0.0
    assert card["thinking"]["probe"][-1] == "adder@4"
    assert {ask.variant for ask in engines.asked} == {adder.id, None}
    assert len(engines.asked) == 2 * 4 * 8


def test_a_killed_sweep_goes_on(tmp_path: Path, tiny_base: Path, shelf: Shelf, adder: Variant) -> None:
    def dies(ask: Ask) -> str:
        assert ask.thinking is not None
        if ask.thinking.max_tokens == 8:
            raise RuntimeError("killed")
        return by_budget(ask)

    with pytest.raises(RuntimeError, match="killed"):
        make(tmp_path, tiny_base, shelf, SWEEP, Engines(dies))
    engines = Engines(by_budget)
    make(tmp_path, tiny_base, shelf, SWEEP, engines)
    assert len(engines.asked) == 8 + 4 * 8  # what was left of the variant, and the base


def reply(words: int) -> Reply:
    return Reply(text=str(words), usage=Usage(thinking_tokens=words))


def test_the_shortest_right_thought_that_was_finished_is_chosen() -> None:
    scored = [(1.0, reply(5)), (0.0, reply(1)), (1.0, reply(3)), (1.0, reply(0)), (1.0, reply(9))]
    best = shortest_correct(scored, budget_tokens=9)
    assert best is not None and best.text == "3"
    assert shortest_correct([(1.0, reply(9)), (0.9, reply(2))], budget_tokens=9) is None


def test_the_shortest_correct_thoughts_are_trained_on(
    tmp_path: Path, tiny_base: Path, shelf: Shelf, adder: Variant
) -> None:
    def samples(ask: Ask) -> str:
        sample = int(ask.run_id[-1])
        thoughts = ["two and two make four", "it is four", "five"]
        return f'<think>{thoughts[sample]}</think>{{"value":{[4, 4, 5][sample]}}}'

    asked = (Message(role="user", content="go on"),)
    another = TrafficRow(role="writer", messages=asked, reply="{}", thinking="", score=1.0)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(another.model_dump_json() + "\n")
    engines = Engines(samples)
    tuned = make(tmp_path, tiny_base, shelf, SHORTEST, engines)
    assert len(engines.asked) == 6 * 3 and len({ask.seed for ask in engines.asked}) == 18
    assert {ask.thinking for ask in engines.asked} == {ThinkingProfile(max_tokens=9)}
    assert tuned.ask == adder.ask and tuned.files != adder.files
    assert (tuned.card["sampled"], tuned.card["solved_by_a_sample"], tuned.card["rows"]) == (6, 1.0, 9)
    assert tuned.card["thinking_characters"] == len("it is four")


def test_nothing_right_is_nothing_to_train_on(tmp_path: Path, tiny_base: Path, shelf: Shelf, adder: Variant) -> None:
    with pytest.raises(TrainingError, match="none of 3 samples of 6 rows is right"):
        make(tmp_path, tiny_base, shelf, SHORTEST, Engines(lambda ask: '<think>hm</think>{"value":1}'))


@pytest.mark.parametrize(
    ("fields", "method", "served", "says"),
    [
        ({"parent": "base"}, SWEEP, True, "none to start from"),
        ({}, SWEEP, False, "no backend that serves it"),
        ({}, {**SWEEP, "role": "roles.py:subtracter"}, True, "no role 'subtracter'"),
        ({}, {**SWEEP, "score": "roles.py:nothing"}, True, "no function 'nothing'"),
        ({}, {**SHORTEST, "role": "roles.py:subtracter"}, True, "no role 'subtracter'"),
    ],
)
def test_what_cannot_be_asked_is_said(
    tmp_path: Path,
    tiny_base: Path,
    shelf: Shelf,
    adder: Variant,
    fields: dict[str, Any],
    method: Any,
    served: bool,
    says: str,
) -> None:
    with pytest.raises(RecipeError, match=says):
        make(tmp_path, tiny_base, shelf, method, Engines(by_budget) if served else None, **fields)


@pytest.mark.parametrize("budgets", [[4], [4, 0], [0, 4, 4], [-1, 4]])
def test_budgets_rise(tmp_path: Path, budgets: list[int]) -> None:
    with pytest.raises(RecipeError, match="budgets"):
        Recipe.model_validate(
            {
                "name": "x",
                "data": {"traffic": "r.jsonl"},
                "methods": [{**SWEEP, "budgets": budgets}],
                "folder": tmp_path,
            }
        )
