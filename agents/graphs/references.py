"""References to steps: which step of which body one names, and whether that is the step of the previous round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx

from ..errors import GraphError
from .drafts import Draft, FieldRef, GraphDraft, InputRef, LoopDraft, Reference, StepRef, field_type, gives_of
from .nodes import GraphInput, GraphInputField, PreviousRound, Source, StepOutput

__all__ = ["Level", "is_previous_round", "locate", "outwards", "source_of"]


@dataclass
class Level:
    """One body while it is checked: its steps, its edges, and the body around it."""

    graph: GraphDraft
    drafts: dict[str, Draft]
    prefix: tuple[str, ...]
    edges: nx.DiGraph
    outer: Level | None

    @property
    def around(self) -> str:
        """Name of the outer node that holds this body."""
        return self.prefix[-1]


def locate(level: Level, draft: Draft, reference: Reference) -> tuple[int, tuple[str, ...]] | None:
    """How many bodies further out a reference points, and its path from there; None for the graph's input."""
    step = _apart(level, reference)[0]
    if isinstance(step, InputRef) and step.graph == level.graph.name:
        return None
    hops, at = 0, level
    while True:
        if isinstance(step, InputRef):
            pass
        elif isinstance(step, str):
            if step in at.drafts:
                return hops, (step,)
        elif (
            step.graph == at.graph.name
            and step.path[: len(at.prefix)] == at.prefix
            and step.path[len(at.prefix)] in at.drafts
        ):
            return hops, step.path[len(at.prefix) :]
        if at.outer is None:
            break
        hops, at = hops + 1, at.outer
    shown = step if isinstance(step, str) else f"{step.graph}:{'/'.join(getattr(step, 'path', ('input',)))}"
    raise GraphError(
        f"step {draft.name!r} names the unknown step {shown!r}",
        expected=f"one of {', '.join(sorted(level.drafts))}, or a step of an enclosing level",
        remedy="Correct the name, or use a step of this graph.",
    )


def source_of(level: Level, draft: Draft, reference: Reference) -> tuple[Source, Any]:
    """A reference as a source, and the type it gives; raises GraphError when it names no step."""
    found = locate(level, draft, reference)
    field = _apart(level, reference)[1]
    if found is None:
        if field is None:
            return GraphInput(), level.graph.takes
        return GraphInputField(field), field_type(level.graph.takes, field, f"graph {level.graph.name!r} takes")
    hops, path = found
    target = outwards(level, hops).drafts[path[0]]
    for name in path[1:]:
        assert isinstance(target.work, LoopDraft)
        target = next(inner for inner in target.work.body if inner.name == name)
    given = reference.gives if isinstance(reference, FieldRef | StepRef) else gives_of(target)
    if isinstance(reference, str) and field is not None:
        given = field_type(given, field, f"step {target.name!r} gives")
    if is_previous_round(level, draft, reference):
        return PreviousRound(0, path, field), given
    return StepOutput(hops, path, field), given


def is_previous_round(level: Level, draft: Draft, reference: Reference) -> bool:
    """In a loop, a pinned step that runs later, or is only declared later, means that step in the previous round."""
    at = locate(level, draft, reference)
    if at is None or at[0] or level.outer is None:
        return False
    path = at[1]
    if _reaches(level, draft.name, path[0]):
        return True
    order = list(level.drafts)
    return order.index(path[0]) > order.index(draft.name) and not _reaches(level, path[0], draft.name)


def _reaches(level: Level, start: str, end: str) -> bool:
    return start == end or bool(nx.has_path(level.edges, start, end))


def outwards(level: Level, hops: int) -> Level:
    """The body so many bodies further out."""
    for _ in range(hops):
        assert level.outer is not None
        level = level.outer
    return level


def _apart(level: Level, reference: Reference) -> tuple[StepRef | InputRef | str, str | None]:
    """A reference as (what has the value, field of it); `plan.parts` names a field unless a step is called that."""
    if isinstance(reference, FieldRef):
        return reference.step, reference.field
    if not isinstance(reference, str) or _is_step(level, reference):
        return reference, None
    name, _, field = reference.partition(".")
    if name == "input" and not _is_step(level, name):
        return InputRef(level.graph.takes, level.graph.name), field or None
    return (name, field) if field and _is_step(level, name) else (reference, None)


def _is_step(level: Level, name: str) -> bool:
    at: Level | None = level
    while at is not None:
        if name in at.drafts:
            return True
        at = at.outer
    return False
