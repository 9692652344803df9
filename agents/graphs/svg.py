"""A workflow drawn as SVG: for a report's page, which gives it colours and figures, and by itself, for notebooks."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from .layout import Box, Drawing, Line, lay_out
from .nodes import BuiltGraph
from .workflow_shape import StepShape, WorkflowShape, workflow_shape

__all__ = ["draw_shape", "graph_html"]

CHARACTER = 7.3
SMALL_CHARACTER = 6.2
PAD = 14.0
PLAIN_HEIGHT, BAR_ROOM, BAR_HEIGHT = 34.0, 12.0, 4.0
MARGIN, PILL_GAP, PILL_HEIGHT = 6.0, 40.0, 30.0

MOST_STEPS_DRAWN = 200
"""Steps of a graph that draws itself; more are no picture that anybody reads."""

MOST_LINE_CHARACTERS = 80
"""Characters of a name or a line in a graph that draws itself; the rest is left out."""

XMLNS = 'xmlns="http://www.w3.org/2000/svg" '

ALONE = """
svg{background:#fff;font-family:system-ui,sans-serif}text{fill:#1c2126}.name{font-size:13px;font-weight:600}
.small{font-size:11.5px;fill:#66707a}rect{fill:#fff;stroke:#a3acb5}.role rect{stroke:#0d7a70}
rect.frame{fill:#f6f7f9;stroke:#e3e6ea}rect.pill{fill:none;stroke:#e3e6ea}path{fill:none;stroke:#66707a;stroke-width:1.2}
marker path{fill:#66707a;stroke:none}.conditional{stroke-dasharray:4 3}.returns{stroke-dasharray:2 3}
"""
"""Style of a picture without a page around it."""


def graph_html(graph: BuiltGraph) -> str:
    """The workflow as a picture for a notebook: an image, so that nothing of it reaches the page around it."""
    whole = workflow_shape(graph)
    shape = whole.model_copy(
        update={name: getattr(whole, name)[:MOST_LINE_CHARACTERS] for name in ("name", "takes", "gives")}
    )
    steps = sum(1 for _ in shape.walk())
    name = escape(shape.name)
    if steps > MOST_STEPS_DRAWN:
        return f"<p>Workflow <b>{name}</b>: {steps} steps, more than {MOST_STEPS_DRAWN} are not drawn here.</p>"
    lines = {path: [line[:MOST_LINE_CHARACTERS] for line in _plain_lines(step)] for path, step in shape.walk()}
    drawn = draw_shape(shape, lines, style=ALONE)
    data = base64.b64encode(drawn.encode("utf-8", "replace")).decode("ascii")
    return f'<img alt="Workflow {name}" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'


def draw_shape(
    shape: WorkflowShape,
    lines: Mapping[str, Sequence[str]],
    shares: Mapping[str, float] | None = None,
    number: int = 0,
    style: str = "",
) -> str:
    """SVG of a workflow, its boxes with these lines (by path); the first one is the box's title.

    `shares` puts a bar on the boxes of roles, 0.0 to 1.0. `number` tells several pictures of one page apart. Colours
    come from the page, or from `style`.
    """

    def size(path: str, step: StepShape) -> tuple[float, float]:
        title, *rest = lines[path]
        width = max(len(title) * CHARACTER, *(len(line) * SMALL_CHARACTER for line in rest), 60.0) + 2 * PAD
        bar = BAR_ROOM if step.kind == "role" and shares is not None else 0.0
        return width, PLAIN_HEIGHT + 17.0 * len(rest) + bar

    drawing = lay_out(shape.body, size)
    takes, gives = _pill_width(shape.takes), _pill_width(shape.gives)
    dx, dy = MARGIN + takes + PILL_GAP, MARGIN
    width, height = dx + drawing.width + PILL_GAP + gives + MARGIN, drawing.height + 2 * MARGIN
    parts = [
        f'<svg class="workflow" {XMLNS if style else ""}viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'role="img" aria-label="Workflow {escape(shape.name)}">{f"<style>{style}</style>" if style else ""}<defs>'
        f'<marker id="arrow-{number}" viewBox="0 0 8 8" refX="7" refY="4" '
        'markerWidth="7" markerHeight="7" orient="auto-start-reverse"><path d="M0 0.5 L8 4 L0 7.5 z"/>'
        "</marker></defs>",
        f'<g transform="translate({dx:.0f} {dy:.0f})">',
        *(_frame(box, lines[box.path]) for box in drawing.boxes if box.step.body),
        *(_line(line) for line in drawing.lines),
        *_ends(shape, drawing, takes, gives),
        *(
            _box(box, lines[box.path], None if shares is None else shares.get(box.path, 0.0))
            for box in drawing.boxes
            if not box.step.body
        ),
        "</g></svg>",
    ]
    return "".join(parts).replace("url(#arrow)", f"url(#arrow-{number})")


def _plain_lines(step: StepShape) -> list[str]:
    """The box's title, and what is below it, before anything ran."""
    title = f"{step.name} ×n" if step.each else step.name
    if step.kind == "loop":
        return [f"{title} · at most {step.rounds} rounds"]
    if step.body:
        return [title]
    who = {"role": step.role, "person": "a person answers"}.get(step.kind, "function")
    gives = f"{step.gives}, remembers" if step.memory else step.gives
    return [title, f"{who} → {gives}" if who != step.name else f"→ {gives}"]


def _pill_width(text: str) -> float:
    return len(text) * SMALL_CHARACTER + 2 * PAD


def _frame(box: Box, lines: Sequence[str]) -> str:
    return (
        f'<rect class="frame" x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="10"/>'
        f'<text class="small" x="{box.x + PAD:.1f}" y="{box.y + 19:.1f}">{escape(lines[0])}</text>'
    )


def _box(box: Box, lines: Sequence[str], share: float | None) -> str:
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
    if kind == "role" and share is not None:
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
