"""Where a step's inputs come from: references, candidates by type, and the previous round of a loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import networkx as nx

from ..errors import GraphError
from ..roles import InputType, type_name
from .drafts import Draft, FieldRef, GraphDraft, InputRef, LoopDraft, Reference, StepRef, field_type, gives_of
from .nodes import Alternatives, GraphInput, GraphInputField, PreviousRound, Source, StepOutput

__all__ = ["Level", "candidates", "find", "fits", "is_previous_round", "locate", "pin", "source_of"]


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
    at = level
    for _ in range(hops):
        assert at.outer is not None
        at = at.outer
    target = at.drafts[path[0]]
    for name in path[1:]:
        assert isinstance(target.work, LoopDraft)
        target = next(inner for inner in target.work.body if inner.name == name)
    given = reference.gives if isinstance(reference, FieldRef | StepRef) else gives_of(target)
    if isinstance(reference, str) and field is not None:
        given = field_type(given, field, f"step {target.name!r} gives")
    if is_previous_round(level, draft, reference):
        return PreviousRound(0, path, field), given
    return StepOutput(hops, path, field), given


def pin(level: Level, draft: Draft, name: str, wanted: InputType, pinned: Reference | tuple[Reference, ...]) -> Source:
    """The source of an input that names its step (several: the first that ran); raises GraphError on a wrong type."""
    sources = []
    for reference in pinned if isinstance(pinned, tuple) else (pinned,):
        source, given = source_of(level, draft, reference)
        if not fits(given, wanted.type):
            raise GraphError(
                f"input {name!r} of step {draft.name!r} takes {type_name(wanted.type)}, "
                f"but {_shown(reference)!r} gives {type_name(given)}",
                expected=f"a step that gives {type_name(wanted.type)}",
            )
        if isinstance(source, PreviousRound) and not wanted.optional:
            source = replace(source, fallback=_required_fallback(level, draft, name, wanted))
        sources.append(source)
    return sources[0] if len(sources) == 1 else Alternatives(tuple(sources))


def find(level: Level, draft: Draft, name: str, wanted: InputType) -> Source | None:
    """Find an input by type: nearest level first, the previous round before what lies outside the loop."""
    ancestors = nx.ancestors(level.edges, draft.name)
    near = candidates(level, ancestors, 0, wanted.type)
    if near:
        return _only(near, draft, name, wanted)
    fallback = _find_outside(level, draft, name, wanted)
    if level.outer is not None:
        later = [n for n in level.drafts if n not in ancestors]
        previous = candidates(level, later, 0, wanted.type)
        if previous and (wanted.optional or fallback is not None):
            source = _only(previous, draft, name, wanted)
            assert isinstance(source, StepOutput)
            return PreviousRound(0, source.path, source.field, fallback)
    if fallback is None and not wanted.optional:
        raise _nothing_fits(level, draft, name, wanted)
    return fallback


def _find_outside(level: Level, draft: Draft, name: str, wanted: InputType) -> Source | None:
    hops, at = 0, level
    while at.outer is not None:
        hops, holder, at = hops + 1, at.around, at.outer
        ancestors = nx.ancestors(at.edges, holder)
        found = candidates(at, ancestors, hops, wanted.type)
        fallback = _only(found, draft, name, wanted) if found else None
        if fallback is None and at.outer is not None and wanted.optional:
            later = [n for n in at.drafts if n not in ancestors and n != holder]
            previous = candidates(at, later, hops, wanted.type)
            if previous:
                source = _only(previous, draft, name, wanted)
                assert isinstance(source, StepOutput)
                return PreviousRound(hops, source.path, source.field)
        if fallback is not None:
            return fallback
    return None


def _required_fallback(level: Level, draft: Draft, name: str, wanted: InputType) -> Source:
    fallback = _find_outside(level, draft, name, wanted)
    if fallback is None:
        raise GraphError(
            f"input {name!r} of step {draft.name!r} comes from the previous round, and round 1 has none",
            expected=f"{type_name(wanted.type)} | None, or a step before the loop that gives it",
            remedy=f"Write {type_name(wanted.type)} | None in `takes`.",
        )
    return fallback


def candidates(level: Level, names: Iterable[str], hops: int, wanted: Any) -> list[tuple[str, Source]]:
    """Steps among `names` that give what is wanted, and the graph's input at the outermost level."""
    chosen = set(names)
    found: list[tuple[str, Source]] = [
        ("/".join(path), StepOutput(hops, path))
        for name, draft in level.drafts.items()
        if name in chosen
        for path, given in _outputs(draft)
        if fits(given, wanted)
    ]
    if level.outer is None and fits(level.graph.takes, wanted):
        found.append(("the graph's input", GraphInput()))
    return found


def _outputs(draft: Draft) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(draft.work, LoopDraft):
        for inner in draft.work.body:
            for path, given in _outputs(inner):
                yield (draft.name, *path), given
    else:
        yield (draft.name,), gives_of(draft)


def _only(found: list[tuple[str, Source]], draft: Draft, name: str, wanted: InputType) -> Source:
    if len(found) > 1:
        raise GraphError(
            f"{len(found)} steps could be the input {name!r} of step {draft.name!r}: "
            f"{', '.join(label for label, _ in found)}",
            expected=f"one step that gives {type_name(wanted.type)}",
            remedy=f"Name it: graph.step(…, inputs={{{name!r}: step}}); graph.input is the graph's input.",
        )
    return found[0][1]


def _nothing_fits(level: Level, draft: Draft, name: str, wanted: InputType) -> GraphError:
    elsewhere = [n for n, d in level.drafts.items() if any(fits(g, wanted.type) for _, g in _outputs(d))]
    remedy = f"Add after={elsewhere[0]}." if elsewhere else "Add a step that gives it, or make it optional."
    return GraphError(
        f"step {draft.name!r} takes {type_name(wanted.type)}, which nothing before it gives",
        expected=f"the graph's input ({type_name(level.graph.takes)}) or an earlier step",
        remedy=remedy,
    )


def fits(given: Any, wanted: Any) -> bool:
    """Whether a value of type `given` may stand where `wanted` is taken: equal types, or a subclass.

    What `Annotated` says beside a type is no part of it: two fields with the same bounds are not even equal.
    """
    if given is None or wanted is None:
        return False
    given, wanted = _without_notes(given), _without_notes(wanted)
    if wanted is Any or given == wanted:
        return True
    try:
        return isinstance(given, type) and isinstance(wanted, type) and issubclass(given, wanted)
    except TypeError:  # a TypedDict is a class and has no subclasses
        return False


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


def _without_notes(kind: Any) -> Any:
    if "Annotated" not in repr(kind):
        return kind

    def holder() -> None: ...

    holder.__annotations__ = {"kind": kind}
    return get_type_hints(holder)["kind"]


def _shown(reference: Reference) -> str:
    if isinstance(reference, FieldRef):
        return f"{reference.step.name}.{reference.field}"
    return reference if isinstance(reference, str) else reference.name
