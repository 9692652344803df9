"""Recipe method `fier`: a variant with retrieval in its engine half, and what cannot work refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from metier.agents.errors import RecipeError
from metier.specializers import EngineSpec, Recipe, Shelf, produce
from tests.tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("fier") / "base", head_dim=64, layers=4)


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate({"name": "long", "methods": [{"method": "fier", **fields}]})


def test_the_engine_half_retrieves_and_the_weights_are_the_bases(base: Path, tmp_path: Path) -> None:
    variant = produce(recipe(budget_tokens=256), shelf=Shelf(tmp_path), base=base)
    assert variant.engine.attention == "fier" and variant.engine.weights == "base"
    assert variant.engine.fier is not None and variant.engine.fier.budget_tokens == 256
    assert variant.card["fier"]["memory_beside_kv_cache"] == pytest.approx((0.5 + 1 / 64 + 1 / 32) / 2, abs=1e-4)
    assert Shelf(tmp_path).get("long") == variant
    assert variant.checkpoint == "base" and variant.served_by == "base+fier-256-32-2-2048-4"  # an engine of its own


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"budget_tokens": 2048}, "context of 2048"),
        ({"budget_tokens": 0}, "budget_tokens"),
        ({"budget_tokens": -1}, "budget_tokens"),
        ({"group_tokens": 33}, "group_tokens"),
        ({"dense_layers": 4}, "dense_layers 4"),
    ],
)
def test_what_cannot_work_is_refused(base: Path, tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        produce(recipe(**fields), shelf=Shelf(tmp_path), base=base)


def test_heads_of_another_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="heads of 32 channels"):
        produce(recipe(), shelf=Shelf(tmp_path / "shelf"), base=write_tiny_llama(tmp_path / "base"))


def test_stock_variants_keep_their_record_and_half_a_choice_is_refused() -> None:
    assert "fier" not in EngineSpec(base="b").model_dump()
    with pytest.raises(ValidationError, match="goes with attention"):
        EngineSpec(base="b", attention="fier")
