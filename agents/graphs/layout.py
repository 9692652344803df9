"""Where the boxes of a workflow go: layers from left to right, frames around what is inside loops and sub-graphs.

Layers are the longest-path ranks of a directed acyclic graph and the order within one is by barycentres, as in
Sugiyama, Tagawa and Toda, IEEE Trans. SMC 11 (1981); each frame is laid out by itself and is then a box of its level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .step_paths import ROOT, StepPath
from .workflow_shape import StepShape

__all__ = ["Box", "Drawing", "Line", "lay_out"]

Size = tuple[float, float]
COLUMN_GAP, ROW_GAP = 46.0, 18.0
FRAME_PAD, FRAME_HEAD, RETURN_ROOM = 18.0, 30.0, 22.0
SWEEPS = 4


@dataclass
class Box:
    """A step's box, or a frame; `x`, `y` is its upper left corner."""

    path: str
    step: StepShape
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Line:
    """An edge as points to go through; `returns` leads from the end of a round to the beginning of the next."""

    points: tuple[tuple[float, float], ...]
    conditional: bool = False
    returns: bool = False


@dataclass
class Drawing:
    """Boxes and lines within `width` × `height`; frames come before what is in them."""

    width: float
    height: float
    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def box(self, path: str) -> Box:
        """The box of a step."""
        return next(box for box in self.boxes if box.path == path)


@dataclass
class _Item:
    """A step in its layer, or (`step` None) a place kept free for a line that passes the layer by."""

    name: str
    size: Size
    step: StepShape | None = None
    inner: Drawing | None = None
    before: list[str] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0


def lay_out(body: Sequence[StepShape], size: Callable[[str, StepShape], Size], around: StepPath = ROOT) -> Drawing:
    """Place the steps of a body; `size` says how large the box of a step (path, step) without a body is."""
    items: dict[str, _Item] = {}
    for step in body:
        items[step.name] = _item(step, around / step.name, size)
    layers = _layers(body, items)
    _order(layers, items)
    width, height = _place(layers)
    returning = any(step.previous for step in body)
    drawing = Drawing(width, height + (RETURN_ROOM if returning else 0.0))
    for step in body:
        item = items[step.name]
        drawing.boxes.append(Box(str(around / step.name), step, item.x, item.y, *item.size))
        if item.inner is not None:
            _move_in(drawing, item)
    for step in body:
        for before in step.after:
            drawing.lines.append(Line(_route(items, before, step.name), conditional=step.conditional))
        for earlier in step.previous:
            drawing.lines.append(_return(items[earlier], items[step.name], height))
    return drawing


def _item(step: StepShape, path: StepPath, size: Callable[[str, StepShape], Size]) -> _Item:
    head = size(str(path), step)
    if not step.body:
        return _Item(step.name, head, step)
    inner = lay_out(step.body, size, path)
    width = max(inner.width + 2 * FRAME_PAD, head[0])
    return _Item(step.name, (width, inner.height + FRAME_HEAD + FRAME_PAD), step, inner)


def _layers(body: Sequence[StepShape], items: dict[str, _Item]) -> list[list[_Item]]:
    """Each step behind all that come before it; lines over several layers get a place in those they pass."""
    rank: dict[str, int] = {}
    for step in body:  # in an order that respects their edges
        rank[step.name] = max((rank[before] + 1 for before in step.after), default=0)
    layers: list[list[_Item]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for step in body:
        layers[rank[step.name]].append(items[step.name])
        for before in step.after:
            last = before
            for layer in range(rank[before] + 1, rank[step.name]):
                name = _passing(before, step.name, layer)
                items[name] = _Item(name, (0.0, 6.0), before=[last])
                layers[layer].append(items[name])
                last = name
            items[step.name].before.append(last)
    return layers


def _passing(before: str, after: str, layer: int) -> str:
    return f"{before}\n{after}\n{layer}"


def _order(layers: list[list[_Item]], items: Mapping[str, _Item]) -> None:
    """Fewer crossings: everything near the mean of what it follows, then near the mean of what follows it."""
    followers: dict[str, list[str]] = {}
    for item in items.values():
        for before in item.before:
            followers.setdefault(before, []).append(item.name)

    def sort(layer: list[_Item], beside: list[_Item], neighbours: Callable[[_Item], list[str]]) -> None:
        place = {item.name: at for at, item in enumerate(beside)}

        def centre(at: int) -> float:
            places = [place[name] for name in neighbours(layer[at]) if name in place]
            return sum(places) / len(places) if places else float(at)

        order = sorted(range(len(layer)), key=lambda at: (centre(at), at))
        layer[:] = [layer[at] for at in order]

    for _ in range(SWEEPS):
        for left, right in zip(layers, layers[1:], strict=False):
            sort(right, left, lambda item: item.before)
        for left, right in reversed(list(zip(layers, layers[1:], strict=False))):
            sort(left, right, lambda item: followers.get(item.name, []))


def _place(layers: list[list[_Item]]) -> Size:
    heights = [sum(item.size[1] for item in layer) + ROW_GAP * (len(layer) - 1) for layer in layers]
    tallest, x = max(heights, default=0.0), 0.0
    for layer, height in zip(layers, heights, strict=True):
        widest = max(item.size[0] for item in layer)
        y = (tallest - height) / 2
        for item in layer:
            if item.step is None:
                item.size = (widest, item.size[1])  # a line passes a layer straight, clear of its widest frame
            item.x, item.y = x + (widest - item.size[0]) / 2, y
            y += item.size[1] + ROW_GAP
        x += widest + COLUMN_GAP
    return max(x - COLUMN_GAP, 0.0), tallest


def _move_in(drawing: Drawing, item: _Item) -> None:
    """Put what is inside a frame into the picture around it."""
    assert item.inner is not None
    dx = item.x + (item.size[0] - item.inner.width) / 2
    dy = item.y + FRAME_HEAD
    for box in item.inner.boxes:
        box.x, box.y = box.x + dx, box.y + dy
        drawing.boxes.append(box)
    for line in item.inner.lines:
        points = tuple((x + dx, y + dy) for x, y in line.points)
        drawing.lines.append(Line(points, line.conditional, line.returns))


def _route(items: Mapping[str, _Item], before: str, after: str) -> tuple[tuple[float, float], ...]:
    start, end = items[before], items[after]
    between = [item for name, item in items.items() if name.startswith(f"{before}\n{after}\n")]
    points = [(start.x + start.size[0], start.y + start.size[1] / 2)]
    for item in sorted(between, key=lambda item: item.x):
        points += [(x, item.y + item.size[1] / 2) for x in (item.x, item.x + item.size[0])]
    return (*points, (end.x, end.y + end.size[1] / 2))


def _return(last: _Item, first: _Item, height: float) -> Line:
    """From below a step, under all the others, to below the one that reads it in the next round."""
    below = height + RETURN_ROOM / 2
    start = (last.x + last.size[0] / 2, last.y + last.size[1])
    end = (first.x + first.size[0] / 2, first.y + first.size[1])
    return Line((start, (start[0], below), (end[0], below), end), returns=True)
