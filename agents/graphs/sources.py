"""Where a step's inputs come from: named steps, candidates by type, and earlier rounds of a loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Optional, get_type_hints

import networkx as nx

from ..errors import GraphError
from ..roles import InputType, type_name
from .drafts import Draft, FieldRef, LoopDraft, Reference, gives_of, inputs_of, item_type
from .nodes import Alternatives, EarlierRounds, GraphInput, PreviousRound, Source, StepOutput
from .references import Level, is_previous_round, outwards, source_of

__all__ = ["candidates", "find", "fits", "pin", "reads_earlier"]


def reads_earlier(level: Level, draft: Draft, name: str, reference: Reference) -> bool:
    """Whether a pinned input is read from earlier rounds alone, so that its step need not come before."""
    if is_previous_round(level, draft, reference):
        return True
    wanted = inputs_of(draft).get(name)
    source, given = source_of(level, draft, reference)
    return wanted is not None and _earlier_rounds(level, source, given, wanted) is not None


def _earlier_rounds(level: Level, source: Source, given: Any, wanted: InputType) -> EarlierRounds | None:
    """What a step of a loop gave in all earlier rounds, where a list of what it gives is wanted."""
    if not isinstance(source, StepOutput | PreviousRound) or fits(given, wanted.type):
        return None
    item = InputType(item_type(wanted.type))
    if outwards(level, source.hops).outer is None or not (fits(given, item.type) or fits(given, _or_none(item))):
        return None
    return EarlierRounds(source.hops, source.path, source.field)


def pin(level: Level, draft: Draft, name: str, wanted: InputType, pinned: Reference | tuple[Reference, ...]) -> Source:
    """The source of an input that names its step (several: the first that ran); raises GraphError on a wrong type."""
    sources: list[Source] = []
    for reference in pinned if isinstance(pinned, tuple) else (pinned,):
        source, given = source_of(level, draft, reference)
        all_rounds = _earlier_rounds(level, source, given, wanted)
        if all_rounds is not None:
            sources.append(all_rounds)
            continue
        if not fits(given, wanted.type) and not (wanted.optional and fits(given, _or_none(wanted))):
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
    near = _candidates(level, ancestors, 0, wanted)
    if near:
        return _only(near, draft, name, wanted)
    fallback = _find_outside(level, draft, name, wanted)
    if level.outer is not None:
        later = [n for n in level.drafts if n not in ancestors]
        previous = _candidates(level, later, 0, wanted)
        if previous and (wanted.optional or fallback is not None):
            source = _only(previous, draft, name, wanted)
            assert isinstance(source, StepOutput)
            return PreviousRound(0, source.path, source.field, fallback)
    found = fallback or _find_all_rounds(level, draft, name, wanted)
    if found is None and not wanted.optional:
        raise _nothing_fits(level, draft, name, wanted)
    return found


def _find_all_rounds(level: Level, draft: Draft, name: str, wanted: InputType) -> Source | None:
    """For a list: the step of the nearest loop around that gives its items, this step itself among them."""
    item = item_type(wanted.type)
    hops, at, holder = 0, level, ""
    while item is not None and at.outer is not None:
        steps = [step for step in at.drafts if step != holder]
        found = _candidates(at, steps, hops, InputType(item, optional=True))  # where it gave null, nothing is listed
        if found:
            source = _only(found, draft, name, wanted)
            assert isinstance(source, StepOutput)
            return EarlierRounds(hops, source.path, source.field)
        hops, holder, at = hops + 1, at.around, at.outer
    return None


def _find_outside(level: Level, draft: Draft, name: str, wanted: InputType) -> Source | None:
    hops, at = 0, level
    while at.outer is not None:
        hops, holder, at = hops + 1, at.around, at.outer
        ancestors = nx.ancestors(at.edges, holder)
        found = _candidates(at, ancestors, hops, wanted)
        fallback = _only(found, draft, name, wanted) if found else None
        if fallback is None and at.outer is not None and wanted.optional:
            later = [n for n in at.drafts if n not in ancestors and n != holder]
            previous = _candidates(at, later, hops, wanted)
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


def _candidates(level: Level, names: Iterable[str], hops: int, wanted: InputType) -> list[tuple[str, Source]]:
    """The same for an input: where nothing gives it, and it may be missing, what gives it or nothing."""
    names = set(names)
    found = candidates(level, names, hops, wanted.type)
    return found or (candidates(level, names, hops, _or_none(wanted)) if wanted.optional else [])


def _or_none(wanted: InputType) -> Any:
    return Optional[wanted.type]  # noqa: UP045  # a type that is known only now


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
            expected=f"one step that gives {type_name(wanted.type)}, or its items in the rounds of a loop",
            remedy=f"Name it: graph.step(…, inputs={{{name!r}: step}}); graph.input is the graph's input.",
        )
    return found[0][1]


def _nothing_fits(level: Level, draft: Draft, name: str, wanted: InputType) -> GraphError:
    elsewhere = [n for n, d in level.drafts.items() if any(fits(g, wanted.type) for _, g in _outputs(d))]
    remedy = f"Add after={elsewhere[0]}." if elsewhere else "Add a step that gives it, or make it optional."
    nullable = [n for n, d in level.drafts.items() if any(fits(g, _or_none(wanted)) for _, g in _outputs(d))]
    if nullable and not elsewhere:
        remedy = f"Write {type_name(wanted.type)} | None in `takes`: {nullable[0]} may give null."
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
