"""Intervals of a mean: bootstrap intervals to report, and anytime-valid bounds to stop early by."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["bootstrap_interval", "mean", "upper_bound"]

RESAMPLES = 2_000
BETS = tuple(share / 20 for share in range(1, 20))
"""Shares of the capital that are bet, averaged: a mixture of martingales is a martingale."""
BISECTIONS = 30


def mean(values: Sequence[float]) -> float:
    """Mean of values, 0 of none."""
    return sum(values) / len(values) if values else 0.0


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over tasks; pass paired differences for a comparison."""
    import numpy as np

    if len(values) < 2:
        return (-float("inf"), float("inf")) if not values else (float(values[0]), float(values[0]))
    given = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(len(given), size=(RESAMPLES, len(given)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(given[draws].mean(axis=1), (tail, 100 - tail))
    return float(low), float(high)


def upper_bound(differences: Sequence[float], alpha: float) -> float:
    """Upper confidence bound of the mean of values from -1 to 1, valid at any stopping time.

    A gambler who bets that the mean is below `m` grows rich only if it is: by Ville's inequality the capital passes
    1/alpha with probability at most alpha when the mean is m (Waudby-Smith and Ramdas, "Estimating means of bounded
    random variables by betting", JRSS-B 2024, theorem 1). The bound is the smallest m that is refuted.
    """
    values = [(value + 1) / 2 for value in differences]
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _capital(values, middle) >= 1 / alpha else (middle, high)
    return 2 * high - 1


def _capital(values: Sequence[float], m: float) -> float:
    """Capital won by betting against a mean of m or more; larger for larger m."""
    if m >= 1.0:
        return float("inf") if any(value < 1.0 for value in values) else 1.0
    total = 0.0
    for share in BETS:
        stake, capital = share / (1.0 - m), 1.0
        for value in values:
            capital *= 1.0 + stake * (m - value)
        total += capital
    return total / len(BETS)
