"""The recipes that tune weights for few bits load, and what they learn from is theirs alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.specializers import load_recipe
from metier.specializers.recipes.recipe import read_rows

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("name", "methods"), [("npft_w4", ["npft", "ptq"]), ("msq", ["msq"])])
def test_the_recipe_loads(name: str, methods: list[str]) -> None:
    recipe = load_recipe(EXAMPLES / "recipes" / f"{name}.yaml")
    assert [settings.model_dump()["method"] for settings in recipe.methods] == methods


def test_text_is_the_same_for_the_same_seed_and_never_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(EXAMPLES / "recipes" / "npft_w4.yaml")
    rows = read_rows(recipe)
    assert len(rows) == 256 and rows == read_rows(recipe)
    assert all(not row.messages and row.reply for row in rows)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from offline_text import held_out  # type: ignore[import-not-found]

    kept = set(held_out())
    assert len(kept) > 60 and not kept & {row.reply for row in rows}
