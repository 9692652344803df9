"""From a declared workflow to a checked one: names, edges, types, and where every input comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import networkx as nx

from .errors import GraphError
from .graph import Draft, FieldRef, LoopDraft, PersonDraft, Reference, StepRef, TaskGraph, gives_of, item_type
from .nodes import (
    Alternatives,
    BuiltBody,
    BuiltGraph,
    BuiltNode,
    FunctionWork,
    GraphInput,
    GraphWork,
    LoopWork,
    PersonWork,
    PreviousRound,
    RoleWork,
    Source,
    StepOutput,
    Work,
)
from .roles import InputType, Role, name_inputs, type_name

__all__ = ["build_graph", "function_types"]


@dataclass
class Level:
    """One body while it is checked: its steps, its edges, and the level around it."""

    graph: TaskGraph
    drafts: dict[str, Draft]
    prefix: tuple[str, ...]
    edges: nx.DiGraph
    outer: Level | None

    @property
    def around(self) -> str:
        """Name of the outer node that holds this body."""
        return self.prefix[-1]


def build_graph(graph: TaskGraph) -> BuiltGraph:
    """Check a declared workflow and freeze it; raises GraphError for everything that could not run."""
    if not graph.steps:
        raise GraphError(f"graph {graph.name!r} has no steps", remedy="Add one: graph.step(role).")
    level = _level(graph, graph.steps, (), None)
    body = _build_body(level)
    return BuiltGraph(graph.name, graph.takes, graph.gives, body, _graph_output(level))


def function_types(function: Callable[..., Any]) -> tuple[dict[str, InputType], Any]:
    """Input and output types of a function step from its annotations; raises GraphError when one is missing."""
    name = getattr(function, "__name__", repr(function))
    if not callable(function):
        raise GraphError(f"{function!r} cannot be a step", expected="a Role, a function or a TaskGraph")
    try:
        hints = get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except Exception as error:
        raise GraphError(f"the annotations of {name!r} cannot be read: {error}") from error
    missing = [p for p in parameters if p not in hints] + ([] if "return" in hints else ["return"])
    if missing:
        raise GraphError(
            f"function step {name!r} has no annotation for {', '.join(missing)}",
            expected="a type for every parameter and for the result",
            remedy=f"Write def {name}(puzzle: Puzzle) -> Verdict.",
        )
    inputs = name_inputs({p: hints[p] for p in parameters}, f"function {name!r}") if parameters else {}
    for parameter in parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            inputs[parameter.name] = replace(inputs[parameter.name], optional=True)
    return inputs, hints["return"]


def _level(graph: TaskGraph, drafts: list[Draft], prefix: tuple[str, ...], outer: Level | None) -> Level:
    edges = nx.DiGraph()
    level = Level(graph, {draft.name: draft for draft in drafts}, prefix, edges, outer)
    edges.add_nodes_from(level.drafts)
    for draft in drafts:
        waits_for = (*draft.after, *((draft.over,) if draft.over is not None else ()))
        for reference in waits_for:
            _add_edge(level, draft, reference)
    for draft in drafts:  # pinned inputs come second: in a loop they may point at the previous round
        for references in draft.inputs.values():
            for reference in references if isinstance(references, tuple) else (references,):
                if not _is_previous_round(level, draft, reference):
                    _add_edge(level, draft, reference)
    if not nx.is_directed_acyclic_graph(edges):
        cycle = [start for start, _ in nx.find_cycle(edges)]
        raise GraphError(
            f"steps wait for each other: {' → '.join([*cycle, cycle[0]])}",
            expected="no cycle outside a loop",
            remedy="Put the steps that repeat into `with graph.loop(…, max_rounds=…):`.",
        )
    return level


def _add_edge(level: Level, draft: Draft, reference: Reference) -> None:
    hops, path = _locate(level, draft, reference)
    if hops == 0:
        level.edges.add_edge(path[0], draft.name)


def _is_previous_round(level: Level, draft: Draft, reference: Reference) -> bool:
    """In a loop, a pinned step that runs later, or is only declared later, means that step in the previous round."""
    hops, path = _locate(level, draft, reference)
    if hops or level.outer is None:
        return False
    if _reaches(level, draft.name, path[0]):
        return True
    order = list(level.drafts)
    return order.index(path[0]) > order.index(draft.name) and not _reaches(level, path[0], draft.name)


def _reaches(level: Level, start: str, end: str) -> bool:
    return start == end or bool(nx.has_path(level.edges, start, end))


def _locate(level: Level, draft: Draft, reference: Reference) -> tuple[int, tuple[str, ...]]:
    """How many bodies further out a reference points, and its path from there."""
    step = reference.step if isinstance(reference, FieldRef) else reference
    hops, at = 0, level
    while True:
        if isinstance(step, str):
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
    shown = step if isinstance(step, str) else f"{step.graph}:{'/'.join(step.path)}"
    raise GraphError(
        f"step {draft.name!r} names the unknown step {shown!r}",
        expected=f"one of {', '.join(sorted(level.drafts))}, or a step of an enclosing level",
        remedy="Correct the name, or use a step of this graph.",
    )


def _build_body(level: Level) -> BuiltBody:
    order = {name: index for index, name in enumerate(level.drafts)}
    names = nx.lexicographical_topological_sort(level.edges, key=order.__getitem__)
    nodes = tuple(_build_node(level, level.drafts[name]) for name in names)
    _check_reached(level, nodes)
    digraph = level.edges.copy()
    for node in nodes:
        digraph.nodes[node.name]["step"] = node
    return BuiltBody(nodes, nx.freeze(digraph))


def _build_node(level: Level, draft: Draft) -> BuiltNode:
    work, inputs = _build_work(level, draft)
    unknown = sorted(set(draft.inputs) - set(inputs))
    if unknown:
        raise GraphError(
            f"step {draft.name!r} has no input named {', '.join(map(repr, unknown))}",
            expected=f"one of {', '.join(inputs) or 'no inputs'}",
        )
    sources: dict[str, Source] = {}
    each = None
    if draft.over is not None:
        each, sources = _fan_out(level, draft, inputs)
    for name, wanted in inputs.items():
        if name == each:
            continue
        pinned = draft.inputs.get(name)
        source = _pin(level, draft, name, wanted, pinned) if pinned else _find(level, draft, name, wanted)
        if source is not None:
            sources[name] = source
    return BuiltNode(
        draft.name, work, inputs, sources, gives_of(draft), tuple(level.edges.predecessors(draft.name)),
        draft.when, each, draft.timeout_s, draft.retries,
    )  # fmt: skip


def _build_work(level: Level, draft: Draft) -> tuple[Work, dict[str, InputType]]:
    work = draft.work
    if isinstance(work, Role):
        return RoleWork(work), dict(work.inputs)
    if isinstance(work, PersonDraft):
        return PersonWork(work.question), name_inputs(work.takes, f"question {draft.name!r}")
    if isinstance(work, TaskGraph):
        return GraphWork(work.build()), name_inputs(work.takes, f"graph {work.name!r}")
    if isinstance(work, LoopDraft):
        if not work.body:
            raise GraphError(
                f"loop {draft.name!r} has no steps", remedy="Write them inside its `with` block."
            )
        inner = _level(level.graph, work.body, (*level.prefix, draft.name), level)
        return LoopWork(_build_body(inner), work.max_rounds, work.until, work.on_limit), {}
    return FunctionWork(work), function_types(work)[0]


def _fan_out(level: Level, draft: Draft, inputs: dict[str, InputType]) -> tuple[str, dict[str, Source]]:
    assert draft.over is not None
    source, given = _source(level, draft, draft.over)
    item = item_type(given)
    fitting = [name for name, wanted in inputs.items() if item is not None and _fits(item, wanted.type)]
    fitting = [name for name in fitting if name not in draft.inputs]
    if len(fitting) != 1:
        raise GraphError(
            f"step {draft.name!r} fans out over {type_name(given)}, which fits {len(fitting)} of its inputs",
            expected="a list whose items fit exactly one input",
            remedy="Give a list of the type that the step takes; pin its other inputs.",
        )
    return fitting[0], {fitting[0]: source}


def _source(level: Level, draft: Draft, reference: Reference) -> tuple[Source, Any]:
    """A reference as a source, and the type it gives."""
    hops, path = _locate(level, draft, reference)
    at = level
    for _ in range(hops):
        assert at.outer is not None
        at = at.outer
    field = reference.field if isinstance(reference, FieldRef) else None
    target = at.drafts[path[0]]
    for name in path[1:]:
        assert isinstance(target.work, LoopDraft)
        target = next(inner for inner in target.work.body if inner.name == name)
    given = reference.gives if isinstance(reference, FieldRef | StepRef) else gives_of(target)
    if _is_previous_round(level, draft, reference):
        return PreviousRound(0, path, field), given
    return StepOutput(hops, path, field), given


def _pin(
    level: Level, draft: Draft, name: str, wanted: InputType, pinned: Reference | tuple[Reference, ...]
) -> Source:
    sources = []
    for reference in pinned if isinstance(pinned, tuple) else (pinned,):
        source, given = _source(level, draft, reference)
        if not _fits(given, wanted.type):
            raise GraphError(
                f"input {name!r} of step {draft.name!r} takes {type_name(wanted.type)}, "
                f"but {_shown(reference)!r} gives {type_name(given)}",
                expected=f"a step that gives {type_name(wanted.type)}",
            )
        if isinstance(source, PreviousRound) and not wanted.optional:
            source = replace(source, fallback=_required_fallback(level, draft, name, wanted))
        sources.append(source)
    return sources[0] if len(sources) == 1 else Alternatives(tuple(sources))


def _find(level: Level, draft: Draft, name: str, wanted: InputType) -> Source | None:
    """Find an input by type: nearest level first, the previous round before what lies outside the loop."""
    ancestors = nx.ancestors(level.edges, draft.name)
    near = _candidates(level, ancestors, 0, wanted.type)
    if near:
        return _only(near, draft, name, wanted)
    fallback = _find_outside(level, draft, name, wanted)
    if level.outer is not None:
        later = [n for n in level.drafts if n not in ancestors]
        previous = _candidates(level, later, 0, wanted.type)
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
        found = _candidates(at, ancestors, hops, wanted.type)
        fallback = _only(found, draft, name, wanted) if found else None
        if fallback is None and at.outer is not None and wanted.optional:
            later = [n for n in at.drafts if n not in ancestors and n != holder]
            previous = _candidates(at, later, hops, wanted.type)
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


def _candidates(level: Level, names: Iterable[str], hops: int, wanted: Any) -> list[tuple[str, Source]]:
    """Steps among `names` that give what is wanted, and the graph's input at the outermost level."""
    chosen = set(names)
    found: list[tuple[str, Source]] = [
        ("/".join(path), StepOutput(hops, path))
        for name, draft in level.drafts.items()
        if name in chosen
        for path, given in _outputs(draft)
        if _fits(given, wanted)
    ]
    if level.outer is None and _fits(level.graph.takes, wanted):
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
            remedy=f"Name it: graph.step(…, inputs={{{name!r}: step}}).",
        )
    return found[0][1]


def _nothing_fits(level: Level, draft: Draft, name: str, wanted: InputType) -> GraphError:
    elsewhere = [n for n, d in level.drafts.items() if any(_fits(g, wanted.type) for _, g in _outputs(d))]
    remedy = f"Add after={elsewhere[0]}." if elsewhere else "Add a step that gives it, or make it optional."
    return GraphError(
        f"step {draft.name!r} takes {type_name(wanted.type)}, which nothing before it gives",
        expected=f"the graph's input ({type_name(level.graph.takes)}) or an earlier step",
        remedy=remedy,
    )


def _graph_output(level: Level) -> Source:
    graph = level.graph
    probe = Draft("graph output", lambda: None, (), {})
    if graph.output:
        references = graph.output if isinstance(graph.output, tuple) else (graph.output,)
        return _pin(level, probe, "output", InputType(graph.gives), references)
    found = [c for c in _candidates(level, level.drafts, 0, graph.gives) if isinstance(c[1], StepOutput)]
    if not found:
        raise GraphError(
            f"graph {graph.name!r} gives {type_name(graph.gives)}, but none of its steps does",
            expected=f"a step that gives {type_name(graph.gives)}",
        )
    if len(found) > 1:
        raise GraphError(
            f"{len(found)} steps of graph {graph.name!r} give {type_name(graph.gives)}: "
            f"{', '.join(label for label, _ in found)}",
            expected="one",
            remedy="Name the one that counts: graph.returns(step).",
        )
    return found[0][1]


def _check_reached(level: Level, nodes: tuple[BuiltNode, ...]) -> None:
    inherited = level.outer is not None and bool(level.outer.drafts[level.around].after)
    reached: set[str] = set()
    for node in nodes:
        inside = isinstance(node.work, LoopWork)  # a loop's body was checked by itself
        if inherited or inside or node.sources or any(name in reached for name in node.after):
            reached.add(node.name)
            continue
        raise GraphError(
            f"step {node.name!r} cannot be reached from the graph's input",
            expected="a step that takes the input, or comes after one that does",
            remedy="Add after=…, or let it take the graph's input.",
        )


def _fits(given: Any, wanted: Any) -> bool:
    if given is None or wanted is None:
        return False
    if wanted is Any or given == wanted:
        return True
    return isinstance(given, type) and isinstance(wanted, type) and issubclass(given, wanted)


def _shown(reference: Reference) -> str:
    if isinstance(reference, FieldRef):
        return f"{reference.step.name}.{reference.field}"
    return reference if isinstance(reference, str) else reference.name
