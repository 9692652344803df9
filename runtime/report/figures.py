"""Figures as SVG, drawn by matplotlib; the caller keeps the data beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.errors import SettingsError

__all__ = ["FrontPoint", "draw_front", "svg_figure"]


@dataclass(frozen=True)
class FrontPoint:
    """One assignment: CPU-seconds a task, quality 0 to 1, and its interval where it was measured."""

    cpu_s: float
    quality: float
    name: str = ""
    interval: tuple[float, float] | None = None


@contextmanager
def svg_figure(path: Path, width_in: float, height_in: float) -> Iterator[Any]:
    """A figure to draw on, written to `path` when the block ends; the same drawing gives the same bytes.

    Raises: SettingsError when matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError(
            f"{path.name} is not drawn: matplotlib is missing",
            expected="the extra `eval`",
            remedy="pip install 'metier[eval]'",
        ) from error
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasSVG(figure)
    yield figure
    # Without a date and with a fixed salt for its ids, a figure changes only when its data do.
    with matplotlib.rc_context({"svg.hashsalt": "metier", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_front(path: Path, front: Sequence[FrontPoint], named: Sequence[FrontPoint]) -> None:
    """Cost against quality: the predicted front as a line of steps, measured assignments as points with intervals.

    Raises: SettingsError when matplotlib is not installed.
    """
    with svg_figure(path, 7.0, 4.5) as figure:
        axes = figure.add_subplot()
        axes.plot(
            [p.cpu_s for p in front],
            [p.quality for p in front],
            "o-",
            ms=3,
            drawstyle="steps-post",
            label="predicted front",
        )
        for point in named:
            low, high = point.interval or (point.quality, point.quality)
            error_bars = [[max(point.quality - low, 0.0)], [max(high - point.quality, 0.0)]]
            axes.errorbar([point.cpu_s], [point.quality], yerr=error_bars, fmt="s", ms=5, capsize=3, label=point.name)
        axes.set_xlabel("CPU-seconds a task")
        axes.set_ylabel("quality (share of tasks solved)")
        axes.set_ylim(0.0, 1.02)
        axes.set_xlim(left=0.0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
