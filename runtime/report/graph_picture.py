"""The workflow drawn with time and cost on it, as SVG that takes its colours from the page."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from html import escape

from ...agents.graphs.step_paths import StepPath
from ...agents.graphs.workflow_shape import StepShape, WorkflowShape
from .costs import Cost
from .graph_layout import Box, Drawing, Line, lay_out
from .ledger import Ledger

__all__ = ["draw_workflow"]

CHARACTER = 7.3
SMALL_CHARACTER = 6.2
PAD = 14.0
PLAIN_HEIGHT, BAR_ROOM, BAR_HEIGHT = 34.0, 12.0, 4.0
MARGIN, PILL_GAP, PILL_HEIGHT = 6.0, 40.0, 30.0


@dataclass
class _Figures:
    """What one step of the workflow took, over all runs, rounds and items."""

    cost: Cost
    function_s: float = 0.0
    ran: int = 0


def draw_workflow(ledger: Ledger, number: int = 0) -> str:
    """SVG of the workflow; each role's box says its variants, seconds and CPU-seconds a run, and its share of the cost.

    "" where the store knows no structure. `number` tells several pictures of one page apart.
    """
    if ledger.shape is None or not ledger.shape.body:
        return ""
    figures = _figures(ledger)
    runs = max(sum(run.started_at is not None for run in ledger.runs), 1)
    lines_of = {path: _lines(path, step, figures[path], runs) for path, step in ledger.shape.walk()}

    def size(path: str, step: StepShape) -> tuple[float, float]:
        title, *rest = lines_of[path]
        width = max(len(title) * CHARACTER, *(len(line) * SMALL_CHARACTER for line in rest), 60.0) + 2 * PAD
        return width, PLAIN_HEIGHT + 17.0 * len(rest) + (BAR_ROOM if step.kind == "role" else 0.0)

    drawing = lay_out(ledger.shape.body, size)
    total = sum(figure.cost.cpu_s for figure in figures.values()) or 1.0
    takes, gives = _pill_width(ledger.shape.takes), _pill_width(ledger.shape.gives)
    dx, dy = MARGIN + takes + PILL_GAP, MARGIN
    width, height = dx + drawing.width + PILL_GAP + gives + MARGIN, drawing.height + 2 * MARGIN
    parts = [
        f'<svg class="workflow" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="Workflow {escape(ledger.shape.name)}"><defs>'
        f'<marker id="arrow-{number}" viewBox="0 0 8 8" refX="7" refY="4" '
        'markerWidth="7" markerHeight="7" orient="auto-start-reverse"><path d="M0 0.5 L8 4 L0 7.5 z"/>'
        "</marker></defs>",
        f'<g transform="translate({dx:.0f} {dy:.0f})">',
        *(_frame(box, lines_of[box.path]) for box in drawing.boxes if box.step.body),
        *(_line(line) for line in drawing.lines),
        *_ends(ledger.shape, drawing, takes, gives),
        *(
            _box(box, lines_of[box.path], figures[box.path].cost.cpu_s / total)
            for box in drawing.boxes
            if not box.step.body
        ),
        "</g></svg>",
    ]
    return "".join(parts).replace("url(#arrow)", f"url(#arrow-{number})")


def _figures(ledger: Ledger) -> dict[str, _Figures]:
    """Workflow path (no rounds, no items) → what was spent there."""
    figures: dict[str, _Figures] = defaultdict(lambda: _Figures(Cost()))
    for ask in ledger.spent:
        figures[StepPath.parse(ask.path).declared].cost.add(ask)
    for step in ledger.steps:
        at = figures[StepPath.parse(step.path).declared]
        at.ran += 1
        at.function_s += 0.0 if step.role else step.finished_at - step.started_at
    return figures


def _lines(path: str, step: StepShape, figures: _Figures, runs: int) -> list[str]:
    """The box's title, and what is below it."""
    title = f"{step.name} ×n" if step.each else step.name
    if step.kind == "loop":
        return [f"{title} · at most {step.rounds} rounds"]
    if step.kind == "person":
        return [title, "a person answers"]
    if step.kind != "role":
        if step.body:
            return [title]
        return [title, f"function · {_short(figures.function_s / runs)} s"]
    cost = figures.cost
    named = step.role if step.role != step.name else ""
    variants = ", ".join(cost.variants) or "not asked"
    seconds = f"{_short(cost.service_s / runs)} s · {_short(cost.cpu_s / runs)} CPU-s"
    return [title, " · ".join(part for part in (named, variants) if part), seconds]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value >= 0.001 or not value else "<0.001"


def _pill_width(text: str) -> float:
    return len(text) * SMALL_CHARACTER + 2 * PAD


def _frame(box: Box, lines: list[str]) -> str:
    return (
        f'<rect class="frame" x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="10"/>'
        f'<text class="small" x="{box.x + PAD:.1f}" y="{box.y + 19:.1f}">{escape(lines[0])}</text>'
    )


def _box(box: Box, lines: list[str], share: float) -> str:
    kind = box.step.kind
    rounding = 17 if kind in ("function", "person") else 6
    parts = [
        f'<g class="step {kind}"><rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="{rounding}"/>'
    ]
    for number, line in enumerate(lines):
        style = "name" if not number else "small"
        parts.append(
            f'<text class="{style}" x="{box.x + PAD:.1f}" y="{box.y + 21 + 17 * number:.1f}">{escape(line)}</text>'
        )
    if kind == "role":
        room = box.width - 2 * PAD
        y = box.y + box.height - 9
        parts.append(
            f'<rect class="track" x="{box.x + PAD:.1f}" y="{y:.1f}" width="{room:.1f}" height="{BAR_HEIGHT}" rx="2"/>'
        )
        parts.append(
            f'<rect class="share" x="{box.x + PAD:.1f}" y="{y:.1f}" width="{room * share:.1f}" height="{BAR_HEIGHT}" '
            f'rx="2"><title>{100 * share:.0f} % of the CPU-seconds</title></rect>'
        )
    return "".join([*parts, "</g>"])


def _line(line: Line) -> str:
    style = "returns" if line.returns else "conditional" if line.conditional else "edge"
    if line.returns:
        (x0, y0), (_, below), (x1, _), (_, y1) = line.points
        curve = f"M{x0:.1f} {y0:.1f} C{x0:.1f} {below + 8:.1f} {x1:.1f} {below + 8:.1f} {x1:.1f} {y1 + 2:.1f}"
        return f'<path class="{style}" d="{curve}" marker-end="url(#arrow)"/>'
    curve = f"M{line.points[0][0]:.1f} {line.points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in zip(line.points, line.points[1:], strict=False):
        bend = (x1 - x0) / 2
        curve += f" C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
    return f'<path class="{style}" d="{curve}" marker-end="url(#arrow)"/>'


def _ends(shape: WorkflowShape, drawing: Drawing, takes: float, gives: float) -> list[str]:
    """The input's and the output's pills, with lines to the steps that begin and from those that nothing follows."""
    followed = {before for step in shape.body for before in step.after}
    middle = drawing.height / 2
    end_x = drawing.width + PILL_GAP
    parts = []
    for step in shape.body:
        box = drawing.box(step.name)
        if not step.after:
            parts.append(_line(Line(((-PILL_GAP, middle), (box.x, box.y + box.height / 2)), step.conditional)))
        if step.name not in followed:
            parts.append(_line(Line(((box.x + box.width, box.y + box.height / 2), (end_x, middle)))))
    for x, width, text in ((-PILL_GAP - takes, takes, shape.takes), (end_x, gives, shape.gives)):
        parts.append(
            f'<rect class="pill" x="{x:.1f}" y="{middle - PILL_HEIGHT / 2:.1f}" width="{width:.1f}" '
            f'height="{PILL_HEIGHT}" rx="15"/><text class="small" text-anchor="middle" x="{x + width / 2:.1f}" '
            f'y="{middle + 4:.1f}">{escape(text)}</text>'
        )
    return parts
