"""From a declared workflow to a checked one: names, edges, types, and where every input comes from."""

from __future__ import annotations

import networkx as nx
from pydantic import ValidationError

from ..answers.answer_schema import check_answer_type
from ..errors import GraphError
from ..recorded_values import check_recordable, type_adapter
from ..roles import InputType, Role, type_name
from .drafts import Draft, GraphDraft, LoopDraft, PersonDraft, Reference, gives_of, inputs_of, item_type
from .nodes import (
    BuiltBody,
    BuiltGraph,
    BuiltNode,
    FunctionWork,
    GraphWork,
    LoopWork,
    PersonWork,
    RoleWork,
    Source,
    StepOutput,
    Work,
)
from .references import Level, locate, source_of
from .sources import candidates, find, fits, pin, reads_earlier
from .svg import graph_html

__all__ = ["build_graph"]


def build_graph(graph: GraphDraft) -> BuiltGraph:
    """Check a declared workflow and freeze it; raises GraphError for everything that could not run."""
    if not graph.steps:
        raise GraphError(f"graph {graph.name!r} has no steps", remedy="Add one: graph.step(role).")
    check_recordable(graph.takes, f"the input of graph {graph.name!r}")
    level = _level(graph, graph.steps, (), None)
    body = _build_body(level)
    return BuiltGraph(graph.name, graph.takes, graph.gives, body, _graph_output(level), graph_html)


def _level(graph: GraphDraft, drafts: list[Draft], prefix: tuple[str, ...], outer: Level | None) -> Level:
    edges = nx.DiGraph()
    level = Level(graph, {draft.name: draft for draft in drafts}, prefix, edges, outer)
    edges.add_nodes_from(level.drafts)
    for draft in drafts:
        waits_for = (*draft.after, *((draft.over,) if draft.over is not None else ()))
        for reference in waits_for:
            _add_edge(level, draft, reference)
    for draft in drafts:  # pinned inputs come second: in a loop they may point at earlier rounds
        for name, references in draft.inputs.items():
            for reference in references if isinstance(references, tuple) else (references,):
                if not reads_earlier(level, draft, name, reference):
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
    found = locate(level, draft, reference)
    if found is not None and found[0] == 0:
        level.edges.add_edge(found[1][0], draft.name)


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
    work, inputs = _build_work(level, draft), inputs_of(draft)
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
        source = pin(level, draft, name, wanted, pinned) if pinned else find(level, draft, name, wanted)
        if source is not None:
            sources[name] = source
    check_recordable(gives_of(draft), f"what step {draft.name!r} gives")
    if isinstance(draft.work, Role | PersonDraft):
        check_answer_type(draft.work.gives, f"what step {draft.name!r} gives")
    _check_stand_in(draft)
    return BuiltNode(
        draft.name, work, inputs, sources, gives_of(draft), tuple(level.edges.predecessors(draft.name)),
        draft.when, each, draft.timeout_s, draft.retries, draft.items,
    )  # fmt: skip


def _check_stand_in(draft: Draft) -> None:
    """Raise GraphError when what stands for an item that failed is no value of the item's type."""
    rules = draft.items
    if not rules.survive or rules.skip:
        return
    gives = item_type(gives_of(draft))
    try:
        type_adapter(gives).validate_python(rules.on_error, strict=True)
    except ValidationError as error:
        raise GraphError(
            f"step {draft.name!r} has on_error={rules.on_error!r}: {error.errors(include_url=False)[0]['msg']}",
            expected=f"'fail', 'skip' or a value of {type_name(gives)}",
        ) from error


def _build_work(level: Level, draft: Draft) -> Work:
    work = draft.work
    if isinstance(work, Role):
        return RoleWork(work)
    if isinstance(work, PersonDraft):
        return PersonWork(work.question)
    if isinstance(work, GraphDraft):
        return GraphWork(build_graph(work))
    if isinstance(work, LoopDraft):
        if not work.body:
            raise GraphError(f"loop {draft.name!r} has no steps", remedy="Write them inside its `with` block.")
        inner = _level(level.graph, work.body, (*level.prefix, draft.name), level)
        return LoopWork(_build_body(inner), work.max_rounds, work.until, work.on_limit)
    return FunctionWork(work)


def _fan_out(level: Level, draft: Draft, inputs: dict[str, InputType]) -> tuple[str, dict[str, Source]]:
    assert draft.over is not None
    source, given = source_of(level, draft, draft.over)
    item = item_type(given)
    fitting = [name for name, wanted in inputs.items() if item is not None and fits(item, wanted.type)]
    fitting = [name for name in fitting if name not in draft.inputs]
    if len(fitting) != 1:
        raise GraphError(
            f"step {draft.name!r} fans out over {type_name(given)}, which fits {len(fitting)} of its inputs",
            expected="a list whose items fit exactly one input",
            remedy="Give a list of the type that the step takes; pin its other inputs.",
        )
    return fitting[0], {fitting[0]: source}


def _graph_output(level: Level) -> Source:
    graph = level.graph
    probe = Draft("graph output", lambda: None, (), {})
    if graph.output:
        references = graph.output if isinstance(graph.output, tuple) else (graph.output,)
        return pin(level, probe, "output", InputType(graph.gives), references)
    found = [c for c in candidates(level, level.drafts, 0, graph.gives) if isinstance(c[1], StepOutput)]
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
