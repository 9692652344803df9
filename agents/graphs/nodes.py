"""What a built graph is made of: nodes, where their inputs come from, and bodies that hold them.

Everything here is frozen. A loop is a node that holds a body, so every level stays acyclic; a sub-graph is a
node that holds a whole built graph with an input of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import networkx as nx
from pydantic import BaseModel, TypeAdapter

from ..content_hash import content_hash
from ..errors import GraphError
from ..roles import InputType, Role, type_name
from ..tools.declared import declared_tools, describe_declared
from .step_paths import ROOT, StepPath

__all__ = [
    "ITEMS_AT_ONCE",
    "WORKFLOW_MODULE",
    "Alternatives",
    "BuiltBody",
    "BuiltGraph",
    "BuiltNode",
    "Condition",
    "EarlierRounds",
    "FunctionWork",
    "GraphInput",
    "GraphInputField",
    "GraphWork",
    "ItemRules",
    "LoopWork",
    "PersonWork",
    "PreviousRound",
    "RoleWork",
    "Source",
    "StepOutput",
    "Work",
]

Condition = Callable[[Any], Any]
"""A function of the outputs so far (`lambda s: s[check].correct`), read for its truth."""


@dataclass(frozen=True)
class GraphInput:
    """The graph's own input."""


@dataclass(frozen=True)
class GraphInputField:
    """One field of the graph's own input."""

    field: str


@dataclass(frozen=True)
class StepOutput:
    """Output of a step, `hops` bodies further out; inside a loop's results the path goes on (`loop`, `step`)."""

    hops: int
    path: tuple[str, ...]
    field: str | None = None


@dataclass(frozen=True)
class PreviousRound:
    """Output of a step in the previous round of the loop `hops` bodies out; in round 1 the fallback, or None."""

    hops: int
    path: tuple[str, ...]
    field: str | None = None
    fallback: Source | None = None


@dataclass(frozen=True)
class EarlierRounds:
    """Outputs of a step in all earlier rounds of the loop `hops` bodies out, as a list: empty in round 1.

    Rounds in which the step was skipped are left out.
    """

    hops: int
    path: tuple[str, ...]
    field: str | None = None


@dataclass(frozen=True)
class Alternatives:
    """The first of several sources that ran (steps with conditions)."""

    sources: tuple[Source, ...]


Source = GraphInput | GraphInputField | StepOutput | PreviousRound | EarlierRounds | Alternatives


@dataclass(frozen=True)
class RoleWork:
    """A model plays a role."""

    role: Role


@dataclass(frozen=True)
class FunctionWork:
    """A Python function, called with its inputs by name: at least once, again after a kill or a failed try."""

    function: Callable[..., Any]


@dataclass(frozen=True)
class PersonWork:
    """A person answers: the run is kept until the answer comes."""

    question: str


@dataclass(frozen=True)
class LoopWork:
    """Rounds of a body until a condition holds or `max_rounds` have run."""

    body: BuiltBody
    max_rounds: int
    until: Condition | None
    on_limit: Literal["continue", "fail"]


@dataclass(frozen=True)
class GraphWork:
    """A whole graph as one step."""

    graph: BuiltGraph


Work = RoleWork | FunctionWork | PersonWork | LoopWork | GraphWork


ITEMS_AT_ONCE = 256
"""Items of a fan-out that run at once unless it says otherwise; the others wait their turn."""


@dataclass(frozen=True)
class ItemRules:
    """How a fan-out does its items: how many at once, and what becomes of one that fails.

    `on_error` is "fail" (the run fails), "skip" (the list is one shorter) or the value that stands for it.
    """

    at_once: int = ITEMS_AT_ONCE
    on_error: Any = "fail"

    @property
    def survive(self) -> bool:
        """Whether the list goes on without an item that failed."""
        return not self._says("fail")

    @property
    def skip(self) -> bool:
        """Whether an item that failed is left out."""
        return self._says("skip")

    def _says(self, word: str) -> bool:
        return isinstance(self.on_error, str) and self.on_error == word


@dataclass(frozen=True)
class BuiltNode:
    """One step of a body: its work, where each input comes from, and when it may start.

    `each` names the input that a fan-out runs over; the node then gives a list.
    """

    name: str
    work: Work
    inputs: Mapping[str, InputType]
    sources: Mapping[str, Source]
    gives: Any
    after: tuple[str, ...]
    when: Condition | None = None
    each: str | None = None
    timeout_s: float | None = None
    retries: int = 1
    items: ItemRules = ItemRules()

    @property
    def inner(self) -> BuiltBody | None:
        """The steps inside a loop or a sub-graph, None for other steps."""
        if isinstance(self.work, LoopWork):
            return self.work.body
        return self.work.graph.body if isinstance(self.work, GraphWork) else None

    @property
    def reads_earlier(self) -> dict[str, bool]:
        """Steps of the same body whose earlier rounds it reads: False for the last round, True for all of them."""

        def walk(source: Source) -> Iterator[tuple[str, bool]]:
            match source:
                case Alternatives():
                    for inner in source.sources:
                        yield from walk(inner)
                case PreviousRound(hops=0) | EarlierRounds(hops=0):
                    yield source.path[0], isinstance(source, EarlierRounds)

        found: dict[str, bool] = {}
        for source in self.sources.values():
            for name, all_rounds in walk(source):
                found[name] = all_rounds or found.get(name, False)
        return found


@dataclass(frozen=True)
class BuiltBody:
    """The steps of one level, in an order that respects their edges."""

    nodes: tuple[BuiltNode, ...]
    digraph: nx.DiGraph = field(repr=False, compare=False)

    @cached_property
    def followers(self) -> Mapping[str, tuple[BuiltNode, ...]]:
        """The steps that wait for each step."""
        return {n.name: tuple(after for after in self.nodes if n.name in after.after) for n in self.nodes}

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Where each step stands in the order of the steps."""
        return {node.name: place for place, node in enumerate(self.nodes)}

    @cached_property
    def over(self) -> Mapping[str, frozenset[str]]:
        """The steps that are over for certain when each step begins."""
        return {node.name: frozenset(nx.ancestors(self.digraph, node.name)) for node in self.nodes}

    def __getitem__(self, name: str) -> BuiltNode:
        for node in self.nodes:
            if node.name == name:
                return node
        raise GraphError(f"no step {name!r}", expected=f"one of {', '.join(node.name for node in self.nodes)}")


@dataclass(frozen=True)
class BuiltGraph:
    """A checked workflow, ready to run: its input and output types, its body, and its fingerprint."""

    name: str
    takes: type[BaseModel]
    gives: Any
    body: BuiltBody
    output: Source
    draw: Callable[[BuiltGraph], str] = field(repr=False, compare=False)
    """How it draws itself in a notebook, as HTML."""

    def _repr_html_(self) -> str:
        return self.draw(self)

    @property
    def digraph(self) -> nx.DiGraph:
        """The top level as a networkx graph; nodes carry their `BuiltNode` as attribute `step`."""
        return self.body.digraph

    def roles(self) -> dict[str, Role]:
        """Every role of the workflow, by name."""
        return {node.work.role.name: node.work.role for _, node in self.walk() if isinstance(node.work, RoleWork)}

    def walk(self) -> Iterator[tuple[str, BuiltNode]]:
        """Every node of every level with its path, outer ones first."""
        yield from _walk(self.body, ROOT)

    def step_at(self, path: StepPath) -> BuiltNode:
        """The step that a path names, in any round or item; raises GraphError when there is none."""
        body: BuiltBody | None = self.body
        for around in path.parent.steps:
            body = None if body is None else body[around.name].inner
        if body is None:
            raise GraphError(f"no step {str(path)!r} in graph {self.name!r}", expected="loops and sub-graphs around it")
        return body[path.name]

    @property
    def fingerprint(self) -> str:
        """Hash of structure, types and instructions; a resumed run must have been made by the same graph."""
        return self._fingerprint(_place)

    @property
    def fingerprint_before_0_2(self) -> str:
        """The same as stores of earlier versions have it: another one for each name a workflow's file was loaded by."""
        return self._fingerprint(lambda function: f"{function.__module__}.{function.__qualname__}")

    def _fingerprint(self, place: Callable[[Callable[..., Any]], str]) -> str:
        described = [self.name, type_name(self.takes), type_name(self.gives)]
        described += [_describe(path, node, place) for path, node in self.walk()]
        return content_hash(described)


def _walk(body: BuiltBody, around: StepPath) -> Iterator[tuple[str, BuiltNode]]:
    for node in body.nodes:
        path = around / node.name
        yield str(path), node
        if node.inner is not None:
            yield from _walk(node.inner, path)


WORKFLOW_MODULE = "metier_workflow_"
"""How the names begin under which workflow files are loaded."""


def _place(function: Callable[..., Any]) -> str:
    """Where a function is from. Its file has one name as a program, and another when a command loads it."""
    module = function.__module__
    own = module == "__main__" or module.startswith(WORKFLOW_MODULE)
    return function.__qualname__ if own else f"{module}.{function.__qualname__}"


def _describe(path: str, node: BuiltNode, place: Callable[[Callable[..., Any]], str]) -> str:
    work = node.work
    match work:
        case RoleWork(role):
            kind = f"role {role.name}: {role.instructions} ({role.max_tokens}, {role.temperature}, {role.top_p})"
            kind += f" thinks {role.thinking!r}" if role.thinking else ""
            kind += f" shown {[message.content for message in role.examples]}" if role.examples else ""
            kind += f" remembers {role.memory_tokens}" if role.memory else ""
            kind += f" calls {describe_declared(declared_tools(role.tools, role.name))}" if role.tools else ""
        case FunctionWork(function):
            kind = f"function {place(function)}"
        case PersonWork(question):
            kind = f"person: {question}"
        case LoopWork():
            kind = f"loop of at most {work.max_rounds}"
        case GraphWork(graph):
            kind = f"graph {graph.name}"
    gives = "" if node.gives is None else json.dumps(TypeAdapter(node.gives).json_schema(), sort_keys=True)
    rules = "" if node.items == ItemRules() else f" | {node.items!r}"
    return f"{path} | {kind} | {sorted(node.sources.items())!r} | {node.after} | {node.each} | {gives}{rules}"
