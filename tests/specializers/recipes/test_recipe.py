"""A recipe is checked whole when it is loaded, and says where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from metier.agents import RecipeError, TrafficRow, write_traffic
from metier.agents.traffic import data_fingerprint
from metier.specializers import ProgramData, Recipe, TrafficData, load_recipe
from metier.specializers.methods.lora import LoraSettings
from metier.specializers.recipes.recipe import read_rows

GOOD: dict[str, Any] = {
    "name": "solver",
    "seed": 3,
    "data": {"program": "rows.py:make_rows", "size": 4},
    "methods": [{"method": "lora", "rank": 4, "steps": 10}],
}
PROGRAM = """
from metier.agents import Message, TrafficRow

def make_rows(size, seed):
    for i in range(size):
        yield TrafficRow(role="solver", messages=(Message(role="user", content=f"{seed} {i}"),), reply="1")

def fails(size, seed):
    raise KeyError("teacher")

def no_rows(size, seed):
    return []

def wrong_rows(size, seed):
    return ["text"]
"""


def write(folder: Path, /, **changes: Any) -> Path:
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    (folder / "rows.py").write_text(PROGRAM)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_recipe_is_loaded_with_its_methods_typed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe.parent == "base"
    assert recipe.data == ProgramData(program="rows.py:make_rows", size=4)
    assert recipe.methods == (LoraSettings(rank=4, steps=10),)
    assert recipe.folder == tmp_path
    assert recipe == Recipe(**{**GOOD, "methods": (LoraSettings(rank=4, steps=10),), "folder": tmp_path})


def test_where_a_recipe_lies_is_no_part_of_it(tmp_path: Path) -> None:
    dumped = load_recipe(write(tmp_path)).model_dump(mode="json")
    assert "folder" not in dumped
    assert str(tmp_path) not in str(dumped)
    assert dumped["methods"][0]["learning_rate"] == 1e-3  # defaults are written out, so they stay true later


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sed": 1}, r"sed: unknown field with value 1; .*Did you mean 'seed'"),
        ({"name": None}, "name: missing"),
        ({"name": "My Solver"}, "name: 'My Solver'"),
        ({"seed": -1}, "seed: -1"),
        ({"data": {"size": 3}}, "data: .*names no source of rows"),
        ({"data": {"program": "rows.py:make_rows", "sise": 3, "size": 4}}, r"data\.sise: .*Did you mean 'size'"),
        ({"data": {"program": "rows.py:make_rows"}}, r"data\.size: missing"),
        ({"data": {"program": "rows:make_rows", "size": 1}}, r"data\.program: 'rows:make_rows'"),
        ({"data": {"traffic": "t.jsonl", "min_score": 2}}, r"data\.min_score: 2"),
        ({"methods": []}, "methods: "),
        ({"methods": [{"rank": 8}]}, r"methods\[0\] is .*method: lora"),
        ({"methods": [{"method": "lorra"}]}, "no method 'lorra'.*Did you mean 'lora'"),
        (
            {"methods": [{"method": "lora"}, {"method": "lora", "learning_rat": 1}]},
            r"methods\[1\]\.learning_rat: unknown.*Did you mean 'learning_rate'",
        ),
        ({"methods": [{"method": "lora", "rank": 0}]}, r"methods\[0\]\.rank: 0"),
        ({"folder": "elsewhere"}, "unknown field 'folder'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named) as caught:
        load_recipe(write(tmp_path, **changes))
    assert "recipe.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00"])
def test_files_that_are_no_recipe_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"none\.yaml cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_programs_give_seeded_rows(tmp_path: Path) -> None:
    rows = read_rows(load_recipe(write(tmp_path)))
    assert [row.messages[0].content for row in rows] == ["3 0", "3 1", "3 2", "3 3"]
    assert data_fingerprint(rows) == data_fingerprint(read_rows(load_recipe(write(tmp_path))))
    assert data_fingerprint(rows) != data_fingerprint(rows[::-1])
    assert data_fingerprint([rows[0].model_copy(update={"thinking": "hm"})]) != data_fingerprint(rows[:1])


@pytest.mark.parametrize(
    ("program", "named"),
    [
        ("none.py:make_rows", "no such file"),
        ("rows.py:make_row", "no function 'make_row'.*Did you mean 'make_rows'"),
        ("rows.py:fails", "raised KeyError: 'teacher'"),
        ("rows.py:no_rows", "gives no rows"),
        ("rows.py:wrong_rows", "yields str"),
    ],
)
def test_programs_that_cannot_be_used_are_named(tmp_path: Path, program: str, named: str) -> None:
    recipe = load_recipe(write(tmp_path, data={"program": program, "size": 2}))
    with pytest.raises(RecipeError, match=named):
        read_rows(recipe)


def test_traffic_is_chosen_by_role_and_score(tmp_path: Path, rows: list[TrafficRow]) -> None:
    other = rows[0].model_copy(update={"role": "critic"})
    failed = rows[1].model_copy(update={"score": 0.4})
    unscored = rows[2].model_copy(update={"score": None})
    write_traffic(tmp_path / "t.jsonl", [*rows[3:6], other, failed, unscored])
    recipe = load_recipe(write(tmp_path, data={"traffic": "t.jsonl", "role": "solver"}))
    assert recipe.data == TrafficData(traffic="t.jsonl", role="solver", min_score=1.0)
    assert read_rows(recipe) == rows[3:6]
    half = load_recipe(write(tmp_path, data={"traffic": "t.jsonl", "min_score": 0.4}))
    assert read_rows(half) == [*rows[3:6], other, failed]
    with pytest.raises(RecipeError, match="gives no rows"):
        read_rows(load_recipe(write(tmp_path, data={"traffic": "t.jsonl", "role": "planner"})))
    with pytest.raises(RecipeError, match="is no file"):
        read_rows(load_recipe(write(tmp_path, data={"traffic": "none.jsonl"})))
    (tmp_path / "t.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match="line 1 is no traffic row"):
        read_rows(load_recipe(write(tmp_path, data={"traffic": "t.jsonl"})))
