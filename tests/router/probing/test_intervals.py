"""Intervals and bounds: against their definition, and kept as often as they promise."""

from __future__ import annotations

import random

import pytest

from metier.router.probing.intervals import bootstrap_interval, mean, upper_bound


def refuted(values: list[float], m: float, alpha: float) -> bool:
    """The definition, written out: a mixture of gamblers who bet against a mean of m."""
    total = 0.0
    for share in range(1, 20):
        capital = 1.0
        for value in values:
            x = (value + 1) / 2
            capital *= 1 + (share / 20) / (1 - m) * (m - x)
        total += capital
    return total / 19 >= 1 / alpha


def test_the_bound_is_where_refuting_begins() -> None:
    rng = random.Random(0)
    values = [rng.choice((-1.0, 0.0, 0.0, 1.0)) for _ in range(40)]
    bound = upper_bound(values, 0.01)
    assert refuted(values, (bound + 1) / 2 + 1e-6, 0.01) and not refuted(values, (bound + 1) / 2 - 1e-6, 0.01)


def test_more_evidence_and_less_care_tighten_it() -> None:
    bounds = [upper_bound([-1.0] * n, 0.01) for n in (0, 4, 8, 16, 32)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] == pytest.approx(1.0) and bounds[-1] < -0.6
    assert upper_bound([-1.0] * 8, 0.1) < upper_bound([-1.0] * 8, 0.001)


def test_looking_at_every_moment_fools_it_no_more_often_than_alpha() -> None:
    """200 sequences of mean 0, looked at after every value: the bound falls below 0 in at most 5 % of them."""
    rng = random.Random(1)
    fooled = 0
    for _ in range(200):
        values: list[float] = []
        for _ in range(30):
            values.append(rng.choice((-1.0, 0.0, 1.0)))
            if refuted(values, 0.5, 0.05):
                fooled += 1
                break
    assert fooled <= 10


def test_bootstrap_holds_the_mean_and_is_the_same_again() -> None:
    values = [0.0, 1.0] * 25
    low, high = bootstrap_interval(values)
    assert low == bootstrap_interval(values)[0]
    assert 0.35 < low < mean(values) < high < 0.65
    assert bootstrap_interval([1.0]) == (1.0, 1.0) and bootstrap_interval([]) == (-float("inf"), float("inf"))
