"""Saturation curves are found again from points on them, and the frontier is what nobody beats."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.specializers.methods.thinking.curves import (
    Saturation,
    ThinkingPoint,
    efficient_points,
    fit_saturation,
    saturated_budget,
)

BUDGETS = [0.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0]


def point(budget: int, quality: float, cpu_ms: float = 1.0, variant: str = "a") -> ThinkingPoint:
    return ThinkingPoint(variant, budget, quality, (quality, quality), float(budget), cpu_ms, 100)


@pytest.mark.parametrize("shape", [1.0, 3.0])
@pytest.mark.parametrize("scale", [6.0, 20.0])
def test_a_curve_is_found_again(shape: float, scale: float) -> None:
    true = Saturation(0.1, 0.9, scale, shape, 0.0)
    found = fit_saturation(BUDGETS, [true.accuracy(b) for b in BUDGETS])
    assert found.error < 0.01
    for tokens in (8.0, 12.0, 28.0, 56.0):  # below the first budget nothing is known but the floor
        assert found.accuracy(tokens) == pytest.approx(true.accuracy(tokens), abs=0.04)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_the_fit_beats_every_curve_of_a_coarse_search(accuracy: list[float]) -> None:
    """The oracle: floors, ceilings and scales tried one by one, shape 1."""
    found = fit_saturation(BUDGETS, accuracy)
    assert 0.0 <= found.floor <= found.ceiling <= 1.0
    levels = [n / 5 for n in range(6)]
    tried = (Saturation(f, c, s, 1.0, 0.0) for f in levels for c in levels if f <= c for s in (4.0, 16.0, 64.0))
    errors = (
        math.sqrt(sum((t.accuracy(b) - y) ** 2 for b, y in zip(BUDGETS, accuracy, strict=True)) / 7) for t in tried
    )
    assert found.error <= min(errors) + 0.02  # the grid of scales does not hold every scale that was tried


def test_more_asks_weigh_more() -> None:
    assert fit_saturation([0.0, 8.0, 8.0], [0.2, 0.9, 0.5], [1, 9, 1]).accuracy(8.0) == pytest.approx(0.864, abs=0.01)


def test_tokens_for_turns_the_curve_around() -> None:
    curve = Saturation(0.2, 0.8, 10.0, 2.0, 0.0)
    assert curve.accuracy(curve.tokens_for(0.5)) == pytest.approx(0.5)
    assert curve.tokens_for(0.1) == 0.0
    assert curve.tokens_for(0.8) == math.inf


def test_falling_points_are_a_flat_curve() -> None:
    curve = fit_saturation([0.0, 10.0, 20.0], [0.9, 0.6, 0.3])
    assert curve.floor == curve.ceiling == pytest.approx(0.6)


@pytest.mark.parametrize(("tokens", "accuracy"), [([1.0], [0.5]), ([1.0, 2.0], [0.5])])
def test_what_cannot_be_fitted_is_refused(tokens: list[float], accuracy: list[float]) -> None:
    with pytest.raises(ValueError, match="budgets"):
        fit_saturation(tokens, accuracy)


def test_the_smallest_budget_within_the_margin_is_chosen() -> None:
    points = [point(0, 0.2), point(16, 0.7), point(32, 0.89), point(64, 0.9)]
    assert saturated_budget(points, 0.02).budget_tokens == 32
    assert saturated_budget(points, 0.0).budget_tokens == 64
    assert saturated_budget(points, 1.0).budget_tokens == 0


def test_the_frontier_may_mix_variants() -> None:
    strong, weak = point(16, 0.8, 30.0), point(48, 0.8, 20.0, "pruned")
    dear, best = point(32, 0.7, 40.0), point(64, 0.9, 50.0)
    assert efficient_points([strong, weak, dear, best]) == [weak, best]
