"""Curves of accuracy against thinking, and what an accuracy costs on each variant, as SVG from a variant's card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...agents.errors import VariantError
from ...specializers.methods.thinking.curves import Saturation, ThinkingPoint, efficient_points
from ...specializers.shelf.variant import Variant
from .figures import svg_figure

__all__ = ["draw_thinking", "iso_accuracy", "plot_thinking", "thinking_of"]

LEVELS = 60


def thinking_of(variant: Variant) -> tuple[list[ThinkingPoint], dict[str, Saturation]]:
    """The points and curves that method `thinking` put on a variant's card.

    Raises: VariantError when the variant was not made by it.
    """
    found: Mapping[str, Any] | None = variant.card.get("thinking")
    if found is None:
        raise VariantError(
            f"variant {variant.name!r} has no thinking curves on its card",
            expected="a variant that method `thinking` made",
            remedy="Make one: a recipe with that method, and this variant as `parent`.",
        )
    points = [ThinkingPoint(**{**point, "interval": tuple(point["interval"])}) for point in found["points"]]
    return points, {name: Saturation(**curve) for name, curve in found["curves"].items()}


def iso_accuracy(points: Sequence[ThinkingPoint], curve: Saturation, accuracy: float) -> float:
    """CPU milliseconds an ask of one variant takes at an accuracy: its curve turned around, its cost interpolated.

    Infinite where the variant does not come to that accuracy with any budget that was measured.
    """
    import numpy as np

    tokens = curve.tokens_for(accuracy)
    ordered = sorted(points, key=lambda point: point.used_tokens)
    if tokens > ordered[-1].used_tokens:
        return math.inf
    return float(np.interp(tokens, [p.used_tokens for p in ordered], [p.cpu_ms for p in ordered]))


def draw_thinking(path: Path, points: Sequence[ThinkingPoint], curves: Mapping[str, Saturation]) -> None:
    """Left: accuracy against thinking tokens used, measured and fitted. Right: what an accuracy costs on each variant.

    On the right the undominated pairs are marked: the iso-accuracy frontier. The same data give the
    same bytes. Raises: SettingsError when matplotlib is not installed.
    """
    with svg_figure(path, 10.0, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        plot_thinking(left, right, points, curves, [f"C{number}" for number in range(10)], "k")
        for axes in (left, right):
            axes.grid(alpha=0.3)


def plot_thinking(
    left: Any,
    right: Any,
    points: Sequence[ThinkingPoint],
    curves: Mapping[str, Saturation],
    colours: Sequence[str],
    ink: str,
) -> None:
    """Put both halves of the figure on two axes of matplotlib; variants take the colours in turn."""
    for number, (name, curve) in enumerate(curves.items()):
        own = [point for point in points if point.variant == name]
        colour = colours[number % len(colours)]
        errors = [
            [max(p.quality - p.interval[0], 0.0) for p in own],
            [max(p.interval[1] - p.quality, 0.0) for p in own],
        ]
        used = [p.used_tokens for p in own]
        left.errorbar(used, [p.quality for p in own], yerr=errors, fmt="o", ms=4, capsize=2, color=colour, label=name)
        line = [max(used) * n / LEVELS for n in range(LEVELS + 1)]
        left.plot(line, [curve.accuracy(tokens) for tokens in line], "-", lw=1, color=colour)
        levels = [n / LEVELS for n in range(LEVELS + 1)]
        costs = [iso_accuracy(own, curve, level) if level >= curve.floor else math.nan for level in levels]
        right.plot([c if math.isfinite(c) else math.nan for c in costs], levels, "-", lw=1, color=colour, label=name)
    front = efficient_points(points)
    costs, scores = [p.cpu_ms for p in front], [p.quality for p in front]
    right.plot(costs, scores, "s", color=ink, ms=5, mfc="none", label="frontier, measured")
    for point in front:
        right.annotate(str(point.budget_tokens), (point.cpu_ms, point.quality), fontsize="x-small", xytext=(3, -9),
                       textcoords="offset points", color=ink)  # fmt: skip
    left.set_xlabel("thinking tokens used, mean of an ask")
    right.set_xlabel("CPU milliseconds an ask (numbers: budget in tokens)")
    for axes in (left, right):
        axes.set_ylabel("score")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(left=0.0)
        axes.legend(fontsize="small", loc="upper left")
