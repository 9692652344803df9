"""Accuracy against thinking: saturation curves, what an accuracy costs on them, and which pairs are worth keeping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Saturation", "ThinkingPoint", "efficient_points", "fit_saturation", "saturated_budget"]

SCALES = 96
SHAPES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class ThinkingPoint:
    """One variant at one budget: what it scored on `asks` asks (0 to 1, with its interval) and what an ask took.

    `budget_tokens` is the maximum it was given, 0 for off; `used_tokens` the mean it thought; `cpu_ms` the mean CPU
    milliseconds of an ask.
    """

    variant: str
    budget_tokens: int
    quality: float
    interval: tuple[float, float]
    used_tokens: float
    cpu_ms: float
    asks: int


@dataclass(frozen=True)
class Saturation:
    """accuracy(b) = floor + (ceiling - floor) · (1 - exp(-(b/scale)^shape)), b in tokens.

    With shape 1 it is the form of TTSPM, F_max · (1 - (1-p)^N) (arXiv 2505.20522), on top of what is answered without
    thinking; above 1 it is S-shaped: little is gained before the thought can be finished. `error` is the root mean
    square of the residuals.
    """

    floor: float
    ceiling: float
    scale: float
    shape: float
    error: float

    def accuracy(self, tokens: float) -> float:
        """Accuracy at a budget."""
        return self.floor + (self.ceiling - self.floor) * _risen(tokens, self.scale, self.shape)

    def tokens_for(self, accuracy: float) -> float:
        """The smallest budget with that accuracy, infinite where the curve does not come to it."""
        if accuracy <= self.floor:
            return 0.0
        if accuracy >= self.ceiling:
            return math.inf
        missing = (self.ceiling - accuracy) / (self.ceiling - self.floor)
        return float(self.scale * (-math.log(missing)) ** (1 / self.shape))


def fit_saturation(tokens: Sequence[float], accuracy: Sequence[float], weights: Sequence[float] = ()) -> Saturation:
    """Fit the curve by least squares: a grid over scale and shape, floor and gain in closed form, both within 0 to 1.

    `weights` are numbers of asks, all 1 by default. A fit that would fall is flat at the mean.
    Raises: ValueError for fewer than two points, or lengths that differ.
    """
    import numpy as np

    x, y = np.asarray(tokens, dtype=float), np.asarray(accuracy, dtype=float)
    w = np.asarray(weights or [1.0] * len(x), dtype=float)
    if not len(x) == len(y) == len(w) or len(x) < 2:
        raise ValueError(f"{len(x)} budgets, {len(y)} accuracies, {len(w)} weights")
    w = w / w.sum()
    level = float(w @ y)
    best = Saturation(level, level, 1.0, 1.0, math.sqrt(float(w @ (y - level) ** 2)))
    longest = max(float(x.max()), 1.0)
    for scale in np.geomspace(longest / 100, longest * 4, SCALES):
        for shape in SHAPES:
            risen = np.array([_risen(b, float(scale), shape) for b in x])
            centred = risen - w @ risen
            spread = float(w @ centred**2)
            if spread < 1e-12:
                continue
            gain = float(w @ (centred * (y - level))) / spread
            floor = min(max(level - gain * float(w @ risen), 0.0), 1.0)
            gain = min(gain, 1.0 - floor)
            if gain <= 0.0:
                continue
            error = math.sqrt(float(w @ (y - floor - gain * risen) ** 2))
            if error < best.error - 1e-12:
                best = Saturation(floor, floor + gain, float(scale), shape, error)
    return best


def saturated_budget(points: Iterable[ThinkingPoint], margin: float) -> ThinkingPoint:
    """The cheapest point, in tokens used, that scores at most `margin` less than the best; of the points of a variant.

    Measured points decide, not the fit. Raises: ValueError for no points.
    """
    found = list(points)
    best = max(point.quality for point in found)
    return min((p for p in found if p.quality >= best - margin), key=lambda p: (p.used_tokens, p.budget_tokens))


def efficient_points(points: Iterable[ThinkingPoint]) -> list[ThinkingPoint]:
    """Points that no other beats in quality at no more cost, by rising cost: the iso-accuracy frontier, measured."""
    front: list[ThinkingPoint] = []
    for point in sorted(points, key=lambda p: (p.cpu_ms, -p.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front


def _risen(tokens: float, scale: float, shape: float) -> float:
    return -math.expm1(-((tokens / scale) ** shape))
