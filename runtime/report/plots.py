"""The report's figures: matplotlib draws them, the page's style sheet colours them, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ...agents.errors import SettingsError
from ...specializers.methods.thinking.curves import Saturation, ThinkingPoint
from .comparison import Comparison
from .costs import Cost
from .figures import FrontPoint
from .slot_timeline import EngineTimeline
from .thinking_figures import plot_thinking

__all__ = ["Plots", "Series"]

# Colours that no figure uses for itself, each replaced by a variable of the page's style sheet.
INK, FAINT, GRID, ACCENT, TINT, PALE, MUTED, WARN = (f"#0{n}0{n}0{n}" for n in range(1, 9))
VARIABLES = {
    INK: "--ink", FAINT: "--faint", GRID: "--line", ACCENT: "--accent", TINT: "--accent-2", PALE: "--accent-3",
    MUTED: "--muted", WARN: "--warn",
}  # fmt: skip
LINE_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One batch's completion times, and its critical-path bounds where they are known, in seconds."""

    name: str
    completion_s: Sequence[float]
    bound_s: Sequence[float] = ()


class Plots:
    """Draws figures as inline SVG; each gets ids of its own, so that many fit into one page.

    Raises: SettingsError when matplotlib is not installed.
    """

    def __init__(self) -> None:
        try:
            import matplotlib
        except ImportError as error:
            raise SettingsError(
                "a page has figures, and matplotlib is missing",
                expected="the extra `eval`",
                remedy="Run pip install 'metier[eval]', or write Markdown instead, with --markdown FILE.",
            ) from error
        self._matplotlib = matplotlib
        self._count = 0

    def shares(self, costs: dict[str, Cost]) -> str:
        """Per role: prompt and generated tokens, and where the seconds went, as stacked bars."""
        parts_of: list[tuple[str, list[tuple[str, str, list[float]]]]] = [
            (
                "tokens",
                [
                    ("cached prompt", PALE, [float(c.cached_tokens) for c in costs.values()]),
                    ("computed prompt", TINT, [float(c.prefilled_tokens) for c in costs.values()]),
                    ("thinking", MUTED, [float(c.thinking_tokens) for c in costs.values()]),
                    ("answer", ACCENT, [float(c.answer_tokens) for c in costs.values()]),
                ],
            ),
            (
                "seconds, summed over asks",
                [
                    ("queue", GRID, [c.queue_s - c.slot_wait_s for c in costs.values()]),
                    ("slot and swap", WARN, [c.slot_wait_s + c.swap_s for c in costs.values()]),
                    ("prefill", TINT, [c.prefill_s for c in costs.values()]),
                    ("decode", ACCENT, [c.decode_s for c in costs.values()]),
                ],
            ),
        ]
        shown = [(label, parts) for label, parts in parts_of if any(any(values) for _, _, values in parts)]
        if not shown:
            return ""
        figure = self._figure(9.6, 0.9 + 0.34 * len(costs))
        names = list(costs)
        for at, (label, parts) in enumerate(shown):
            axes = figure.add_subplot(1, len(shown), at + 1)
            left = [0.0] * len(names)
            for name, colour, values in parts:
                if any(values):
                    axes.barh(range(len(names)), values, left=left, height=0.62, color=colour, label=name)
                left = [a + b for a, b in zip(left, values, strict=True)]
            axes.set_yticks(range(len(names)), names if not at else [""] * len(names))
            axes.invert_yaxis()
            axes.set_xlabel(label)
            self._thousands(axes)
            self._plain(axes, "x")
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=8, handlelength=0.9,
                columnspacing=1.2, borderaxespad=0.2,
            )  # fmt: skip
        return self._svg(figure, "Tokens and seconds of each role")

    def completion(self, series: Sequence[Series]) -> str:
        """The share of runs that had ended after so many seconds, and by when the critical path would have let them."""
        figure = self._figure(9.6, 2.7)
        axes = figure.add_subplot()
        styles = (ACCENT, MUTED, TINT, FAINT)
        for number, one in enumerate(series):
            colour = styles[number % len(styles)]
            axes.step(*_distribution(one.completion_s), where="post", color=colour, lw=1.8, label=one.name)
            if one.bound_s:
                name = "critical path" if len(series) == 1 else f"{one.name}: critical path"
                axes.step(*_distribution(one.bound_s), where="post", color=colour, lw=1.2, ls=(0, (3, 2)), label=name)
        axes.set_xlabel("seconds a run took")
        axes.set_ylabel("share of runs")
        axes.set_ylim(0, 1.02)
        axes.set_xlim(left=0)
        self._plain(axes, "both")
        axes.legend(loc="lower right", frameon=False, fontsize=8)
        return self._svg(figure, "Distribution of completion times")

    def comparison(self, comparison: Comparison) -> str:
        """Relative differences with their intervals; left of 0 is less than the baseline."""
        shown = [(d, d.relative) for d in comparison.differences if d.relative is not None]
        if not shown:
            return ""
        figure = self._figure(9.6, 0.7 + 0.3 * len(shown))
        axes = figure.add_subplot()
        axes.axvline(0, color=FAINT, lw=1)
        for at, (difference, (middle, low, high)) in enumerate(shown):
            colour = {"better": ACCENT, "worse": WARN}.get(difference.verdict, MUTED)
            axes.plot([100 * low, 100 * high], [at, at], color=colour, lw=2.2, solid_capstyle="butt")
            axes.plot([100 * middle], [at], "o", color=colour, ms=5.5)
        axes.set_yticks(range(len(shown)), [difference.name for difference, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel(f"% of {comparison.baseline}, mean difference of paired tasks with its 95 % interval")
        self._plain(axes, "x")
        return self._svg(figure, f"{comparison.other} against {comparison.baseline}")

    def timeline(self, timeline: EngineTimeline) -> str:
        """Lanes of variants: resident, in use, waiting; above them how many asks ran, queued and waited for a slot."""
        rows = len(timeline.lanes)
        figure = self._figure(9.6, 1.7 + 0.3 * rows)
        grid = figure.add_gridspec(2, 1, height_ratios=[1.1, 0.3 * rows + 0.1])
        above = figure.add_subplot(grid[0])
        below = figure.add_subplot(grid[1], sharex=above)
        above.fill_between(*_changes(timeline.times, timeline.running), color=PALE, lw=0, label="in the engine")
        above.plot(*_changes(timeline.times, timeline.queued), color=MUTED, lw=1, label="waiting")
        if any(timeline.for_slot):
            above.plot(*_changes(timeline.times, timeline.for_slot), color=WARN, lw=1, label="for a slot")
        above.set_ylabel("asks")
        above.set_ylim(bottom=0)
        above.tick_params(labelbottom=False)
        above.yaxis.get_major_locator().set_params(nbins=3, integer=True)
        self._plain(above, "y")
        above.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=8, borderaxespad=0.1
        )
        for at, lane in enumerate(timeline.lanes):
            for spans, colour, offset, height in (
                (lane.resident, PALE, -0.34, 0.68),
                (lane.using, ACCENT, -0.2, 0.4),
                (lane.waiting, WARN, 0.22, 0.12),
                (lane.loading, INK, -0.34, 0.68),
            ):
                bars = [(start, max(end - start, timeline.length_s / 900)) for start, end in spans]
                below.broken_barh(bars, (at + offset, height), facecolors=colour, linewidth=0)
        for pause in timeline.pauses:
            for axes in (above, below):
                axes.axvline(pause, color=FAINT, lw=0.8, ls=(0, (1, 2)))
        below.set_yticks(range(rows), [lane.variant for lane in timeline.lanes])
        below.set_ylim(rows - 0.5, -0.5)
        below.set_xlim(0, timeline.length_s)
        below.set_xlabel("seconds" + (" (idle time cut out at the dotted lines)" if timeline.pauses else ""))
        self._plain(below, "x")
        return self._svg(figure, f"Slots of engine {timeline.engine}")

    def front(self, front: Sequence[FrontPoint], named: Sequence[FrontPoint]) -> str:
        """Cost against quality: the predicted front in steps, measured assignments as points with intervals."""
        figure = self._figure(9.6, 3.2)
        axes = figure.add_subplot()
        axes.step([p.cpu_s for p in front], [p.quality for p in front], where="post", color=TINT, lw=1.4)
        axes.plot([p.cpu_s for p in front], [p.quality for p in front], "o", color=TINT, ms=3, label="predicted front")
        for number, point in enumerate(named):
            low, high = point.interval or (point.quality, point.quality)
            colour = ACCENT if not number else MUTED
            axes.plot([point.cpu_s, point.cpu_s], [low, high], color=colour, lw=1.4)
            axes.plot([point.cpu_s], [point.quality], "s", color=colour, ms=5)
            axes.annotate(
                point.name, (point.cpu_s, point.quality), (7, 3), textcoords="offset points", fontsize=8, color=INK
            )
        axes.set_xlabel("CPU-seconds a task")
        axes.set_ylabel("quality")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.02)
        axes.margins(x=0.15)
        self._plain(axes, "both")
        axes.legend(loc="lower right", frameon=False, fontsize=8)
        return self._svg(figure, "Predicted front of cost and quality")

    def thinking(self, name: str, points: Sequence[ThinkingPoint], curves: Mapping[str, Saturation]) -> str:
        """Accuracy against thinking, and what an accuracy costs on each variant, from the card of one."""
        figure = self._figure(9.6, 3.6)
        left, right = figure.subplots(1, 2)
        plot_thinking(left, right, points, curves, (ACCENT, TINT, MUTED, WARN), INK)
        for axes in (left, right):
            self._plain(axes, "both")
            axes.legend(loc="lower right", frameon=False, fontsize=8)
        return self._svg(figure, f"Thinking curves of {name}")

    # --- style --------------------------------------------------------------------------------------------

    def _figure(self, width: float, height: float) -> Any:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        return figure

    def _plain(self, axes: Any, grid: str) -> None:
        axes.patch.set_alpha(0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(colors=FAINT, labelcolor=INK, length=0, labelsize=9)
        axes.grid(axis=grid, color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(FAINT)
            label.set_fontsize(9)

    def _thousands(self, axes: Any) -> None:
        from matplotlib.ticker import EngFormatter, MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    def _svg(self, figure: Any, title: str) -> str:
        """The figure as an inline element: text stays text, colours become variables, ids are this figure's own."""
        self._count += 1
        for axes in figure.axes:
            if axes.get_legend() is not None:
                for text in axes.get_legend().get_texts():
                    text.set_color(INK)
        written = io.StringIO()
        # A fixed salt for ids and no date: the same store gives the same page.
        with self._matplotlib.rc_context({"svg.hashsalt": "metier", "svg.fonttype": "none"}):
            figure.savefig(
                written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
            )
        text = written.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        prefix = f"f{self._count}-"
        text = re.sub(r'(\bid="|url\(#|href="#)', lambda found: found[1] + prefix, text)
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var({variable})")
        text = re.sub(r"\n\s*", "\n", text)
        text = re.sub(r"(\.\d\d)\d+", r"\1", text)  # a hundredth of a pixel is enough
        # Fonts are the page's own; matplotlib's are measured for layout only.
        text = re.sub(r"font-family: [^;\"]*; ?", "", text)
        size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
        assert size is not None
        head = f'<svg class="plot" role="img" aria-label="{escape(title)}" viewBox="{size[0][9:-1]}" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return re.sub(r"<svg[^>]*", head, text, count=1)


def _changes(times: Sequence[float], counts: Sequence[int]) -> tuple[list[float], list[int]]:
    """The corners of a line of steps: nothing where nothing changes."""
    x, y = [times[0]], [counts[0]]
    for time, count in zip(times[1:], counts[1:], strict=True):
        if count != y[-1]:
            x += [time, time]
            y += [y[-1], count]
    return [*x, times[-1]], [*y, y[-1]]


def _distribution(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """An empirical distribution function in at most a few hundred points."""
    ordered = sorted(values)
    n = len(ordered)
    kept = sorted({min(n - 1, index * n // LINE_POINTS) for index in range(LINE_POINTS)} | {n - 1})
    return [0.0, *(ordered[at] for at in kept)], [0.0, *((at + 1) / n for at in kept)]
