"""Thinking curves from a card, turned around into costs, and drawn."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from metier.agents.errors import VariantError
from metier.runtime.cli.make import draw_variant
from metier.runtime.report.thinking_figures import draw_thinking, iso_accuracy, thinking_of
from metier.specializers import Shelf, Variant
from metier.specializers.methods.thinking.curves import Saturation, ThinkingPoint
from metier.specializers.shelf.variant import EngineSpec

SHIPPED = Path(__file__).parents[3] / "examples" / "variants"
CURVE = Saturation(0.1, 0.9, 10.0, 1.0, 0.0)
POINTS = [ThinkingPoint("solver", b, CURVE.accuracy(b), (0.0, 1.0), float(b), 20.0 + b, 50) for b in (0, 8, 16, 32)]


def variant(card: dict[str, object]) -> Variant:
    return Variant(id="0" * 16, name="solver", base="b", prompt_layout=1, engine=EngineSpec(base="b"), card=card)


def test_a_card_gives_back_what_was_measured() -> None:
    card = {"thinking": {"points": [asdict(point) for point in POINTS], "curves": {"solver": asdict(CURVE)}}}
    read = Variant.model_validate_json(variant(card).model_dump_json())
    assert thinking_of(read) == (POINTS, {"solver": CURVE})
    with pytest.raises(VariantError, match="no thinking curves"):
        thinking_of(variant({}))


def test_an_accuracy_costs_what_its_thinking_costs() -> None:
    for tokens in (0.0, 4.0, 20.0):
        assert iso_accuracy(POINTS, CURVE, CURVE.accuracy(tokens)) == pytest.approx(20.0 + tokens)
    assert iso_accuracy(POINTS, CURVE, 0.05) == 20.0
    assert iso_accuracy(POINTS, CURVE, 0.89) == math.inf  # more thinking than was measured
    assert iso_accuracy(POINTS, CURVE, 0.95) == math.inf


def test_the_figure_is_the_same_for_the_same_data(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        draw_thinking(tmp_path / name, POINTS, {"solver": CURVE})
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert "solver" in text and "frontier" in text


def test_a_variant_is_drawn_from_its_card(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shutil.copytree(SHIPPED / "planner", tmp_path / "shelf" / "planner")
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(VariantError, match="no thinking curves"):
        draw_variant("planner", tmp_path / "out.svg", shelf)
    shelf.annotate(
        "planner", {"thinking": {"points": [asdict(p) for p in POINTS], "curves": {"solver": asdict(CURVE)}}}
    )
    draw_variant("planner", tmp_path / "out.svg", shelf)
    assert "frontier" in (tmp_path / "out.svg").read_text()
