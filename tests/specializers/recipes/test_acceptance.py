"""The acceptance rule of recipes: what a method made is kept only while the role's quality holds."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from metier.agents import Ask, Message, MetierError, ScriptedBackend, TrafficRow, write_traffic
from metier.agents.errors import AskRejectedError, QualityError, RecipeError, UnknownVariantError
from metier.specializers import Recipe, Shelf, Variant, produce
from metier.specializers.methods.method import METHODS
from metier.specializers.methods.role_quality import paired_interval

HALF = {"method": "scaled", "factor": 0.5}
QUARTER = {"method": "scaled", "factor": 0.25}
ASKS = 20
PROGRAM = """
from pydantic import BaseModel
from metier.agents import Role

class Number(BaseModel):
    value: int

adder = Role("adder", takes={"sum": str}, gives=Number)
taker = Role("taker", takes={"sum": str}, gives=Number)

def lenient(row, answer): return 1.0
def broken(row, answer): return 1 / 0
def endless(row, answer): return float("nan")
"""


@pytest.fixture(autouse=True)
def scaled_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "scaled", "tests.specializers.scaled_weights")


@pytest.fixture
def folder(tmp_path: Path, rows: list[TrafficRow]) -> Path:
    write_traffic(tmp_path / "rows.jsonl", rows)
    (tmp_path / "roles.py").write_text(PROGRAM)
    asked = (Message(role="user", content="2+2"),)
    answers = [TrafficRow(role="adder", messages=asked, reply='{"value": 4}', score=1.0)] * ASKS
    write_traffic(tmp_path / "answers.jsonl", answers)
    return tmp_path


def recipe(folder: Path, *methods: dict[str, Any], **accept: Any) -> Recipe:
    rule = {"role": "roles.py:adder", "data": {"traffic": "answers.jsonl"}, **accept}
    given = {"name": "small", "data": {"traffic": "rows.jsonl"}, "methods": methods, "accept": rule, "folder": folder}
    return Recipe.model_validate(given)


def without_rule(name: str, method: dict[str, Any], folder: Path, shelf: Shelf, base: Path) -> Variant:
    given = {"name": name, "data": {"traffic": "rows.jsonl"}, "methods": [method], "folder": folder}
    return produce(Recipe.model_validate(given), shelf=shelf, base=base)


class Engines:
    """Backends that know each variant's share of right answers by its name, and keep what they were asked."""

    def __init__(self, right: dict[str, int]) -> None:
        self.right = right
        self.asked: list[str] = []

    @asynccontextmanager
    async def __call__(self, shelf: Shelf) -> AsyncGenerator[ScriptedBackend]:
        def answer(ask: Ask) -> Any:
            name = "base" if ask.variant is None else shelf.get(ask.variant).name
            self.asked.append(name)
            number = int(ask.run_id.rpartition("-")[2])
            return {"value": 4} if number < self.right[name] else {"value": 5}

        yield ScriptedBackend({"adder": answer})


def make(recipe: Recipe, base: Path, engines: Engines, shelf: Shelf | None = None) -> Variant:
    return produce(recipe, shelf=shelf or Shelf(recipe.folder / "shelf"), base=base, open_backend=engines)


def test_every_step_that_holds_the_quality_is_kept(folder: Path, tiny_base: Path) -> None:
    engines = Engines({"base": 20, "small.1-scaled": 19, "small.2-scaled": 18})
    notes: list[str] = []
    variant = produce(
        recipe(folder, HALF, QUARTER, margin=0.05),
        shelf=Shelf(folder / "shelf"),
        base=tiny_base,
        open_backend=engines,
        on_note=notes.append,
    )
    assert [stage["method"] for stage in variant.card["stages"]] == ["scaled", "scaled"]
    card = variant.card
    assert (card["role"], card["asks"], card["quality"], card["quality_before"]) == ("adder", ASKS, 0.9, 0.95)
    assert card["compared_with"] == "small.1-scaled" and "rejected" not in card
    assert engines.asked == ["base"] * ASKS + ["small.1-scaled"] * ASKS + ["small.2-scaled"] * ASKS
    assert notes[-1] == "adder on small.2-scaled: 20 of 20 asks answered"


def test_a_recipe_ends_with_the_last_step_that_was_accepted(folder: Path, tiny_base: Path) -> None:
    engines = Engines({"base": 20, "small.1-scaled": 20, "small.2-scaled": 10})
    shelf = Shelf(folder / "shelf")
    variant = make(recipe(folder, HALF, QUARTER, HALF), tiny_base, engines, shelf)
    alone = without_rule("alone", HALF, folder, shelf, tiny_base)
    assert variant.files["weights/model.safetensors"] == alone.files["weights/model.safetensors"]
    assert "stages" not in variant.card and variant.card["quality"] == 1.0
    rejected = variant.card["rejected"]
    assert (rejected["method"], rejected["quality"], rejected["quality_before"]) == ("scaled", 0.5, 1.0)
    assert rejected["quality_change"][0] == -0.5
    assert [v.name for v in shelf.list()] == ["alone", "small"]
    assert make(recipe(folder, HALF, QUARTER, HALF), tiny_base, Engines({}), shelf).id == variant.id


def test_nothing_is_kept_of_a_first_step_that_loses_too_much(folder: Path, tiny_base: Path) -> None:
    engines = Engines({"base": 20, "small.1-scaled": 15})
    shelf = Shelf(folder / "shelf")
    with pytest.raises(QualityError, match=r"adder.* scores 0\.750 on 20 asks, base 1\.000") as caught:
        make(recipe(folder, HALF, margin=0.2), tiny_base, engines, shelf)
    assert "margin" in caught.value.remedy and not shelf.list()
    made = sorted(shelf.folder.glob(".work/*/*/made.json"))
    written = [path.stat().st_mtime_ns for path in made]
    # Another margin: the step is not made again, and nothing is asked again.
    silent = Engines({})
    with pytest.raises(QualityError):
        make(recipe(folder, HALF, margin=0.24), tiny_base, silent, shelf)
    assert [path.stat().st_mtime_ns for path in made] == written and len(made) == 1
    assert make(recipe(folder, HALF, margin=0.25), tiny_base, silent, shelf).card["quality"] == 0.75
    assert not silent.asked


def test_a_variant_can_be_compared_with_another_than_its_parent(folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(folder / "shelf")
    without_rule("best", QUARTER, folder, shelf, tiny_base)
    engines = Engines({"base": 0, "best": 20, "small.1-scaled": 18})
    with pytest.raises(QualityError, match=r"best 1\.000"):
        make(recipe(folder, HALF, against="best"), tiny_base, engines, shelf)
    with pytest.raises(UnknownVariantError, match="bast"):
        make(recipe(folder, HALF, against="bast"), tiny_base, engines, shelf)
    assert make(recipe(folder, HALF), tiny_base, engines, shelf).card["quality_before"] == 0.0


@pytest.mark.parametrize(
    ("accept", "said"),
    [
        ({"role": "roles.py:added"}, "Did you mean 'adder'"),
        ({"role": "rules.py:adder"}, "no such file"),
        ({"role": "roles.py:lenient"}, "has no role 'lenient'"),
        ({"role": "roles.py:taker"}, "rows of adder"),
        ({"score": "roles.py:lenent"}, "Did you mean 'lenient'"),
        ({"score": "roles.py:broken"}, "ZeroDivisionError"),
        ({"score": "roles.py:endless"}, "gave nan"),
        ({"data": {"traffic": "answers.jsonl", "role": "nobody"}}, "gives no rows"),
        ({"margin": 2.0}, "less than or equal to 1"),
    ],
)
def test_what_cannot_be_judged_is_named(folder: Path, tiny_base: Path, accept: dict[str, Any], said: str) -> None:
    with pytest.raises((MetierError, ValueError)) as caught:
        make(recipe(folder, HALF, **accept), tiny_base, Engines({"base": 20, "small.1-scaled": 20}))
    assert said in str(caught.value)
    assert not Shelf(folder / "shelf").list()


def test_a_score_of_ones_own_decides(folder: Path, tiny_base: Path) -> None:
    engines = Engines({"base": 20, "small.1-scaled": 0})
    assert make(recipe(folder, HALF, score="roles.py:lenient"), tiny_base, engines).card["quality"] == 1.0


def test_a_backend_is_asked_for_and_its_errors_come_through(folder: Path, tiny_base: Path) -> None:
    with pytest.raises(RecipeError, match="no backend to measure it with"):
        produce(recipe(folder, HALF), shelf=Shelf(folder / "shelf"), base=tiny_base)

    @asynccontextmanager
    async def mute(shelf: Shelf) -> AsyncGenerator[ScriptedBackend]:
        yield ScriptedBackend()

    with pytest.raises(AskRejectedError, match="no script for role 'adder'"):
        produce(recipe(folder, HALF), shelf=Shelf(folder / "shelf"), base=tiny_base, open_backend=mute)


def test_paired_interval_covers_the_mean_difference() -> None:
    difference, low, high = paired_interval([1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0])
    assert difference == 0.5 and 0.0 <= low < 0.5 < high <= 1.0
    assert paired_interval([0.5] * 8, [0.25] * 8) == (0.25, 0.25, 0.25)
