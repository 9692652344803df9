"""A workflow's structure as plain data, kept with a batch, from which reports draw it and bound its time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..roles import type_name
from .nodes import (
    BuiltBody,
    BuiltGraph,
    BuiltNode,
    FunctionWork,
    GraphWork,
    LoopWork,
    PersonWork,
    RoleWork,
)
from .step_paths import ROOT, PathStep, StepPath

__all__ = ["StepShape", "StepsThatRan", "WorkflowShape", "read_shape", "workflow_shape"]

StepKind = Literal["role", "function", "person", "loop", "graph"]


class StepShape(BaseModel):
    """One step: what it is, what must come before it, and the steps inside it when it is a loop or a graph."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    """Name within its body."""
    kind: StepKind
    """What does the step's work."""
    role: str = ""
    """The role's name, "" where no model is asked."""
    memory: bool = False
    """Whether the role is shown its own earlier turns."""
    gives: str = ""
    """Name of the type that it returns."""
    after: tuple[str, ...] = ()
    """Names of the steps of the same body that it waits for."""
    previous: tuple[str, ...] = ()
    """Names of the steps of the same body whose earlier rounds it reads."""
    conditional: bool = False
    """Whether a condition decides if it runs."""
    each: bool = False
    """Whether it fans out over a list."""
    rounds: int = 0
    """A loop's limit, 0 for other steps."""
    body: tuple[StepShape, ...] = ()
    """The steps inside a loop or a graph."""


class WorkflowShape(BaseModel):
    """A whole workflow as data, without its code."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    """The graph's name."""
    takes: str
    """Name of the input's type."""
    gives: str
    """Name of the output's type."""
    body: tuple[StepShape, ...] = ()
    """The steps, in an order that respects their edges."""

    def walk(self) -> Iterator[tuple[str, StepShape]]:
        """Every step with its path (`attempt/critic`: no rounds, no items), outer ones first."""
        yield from _walk(self.body, ROOT)


class StepsThatRan:
    """The part of a workflow that one run reached: each step's rounds and items, from the recorded paths."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._ran: dict[tuple[StepPath, str], set[PathStep]] = {}
        for path in paths:
            for around, step in StepPath.parse(path).levels():
                self._ran.setdefault((around, step.name), set()).add(step)

    def of(self, step: StepShape, around: StepPath) -> list[StepPath]:
        """The rounds of a loop or the items of a fan-out in their order, other steps once; empty for what did not run.

        `around` is the round, item or sub-graph that the step is in.
        """
        ran = self._ran.get((around, step.name), set())
        return [around.then(one) for one in sorted(ran, key=lambda one: (one.round or 0, one.item or 0))]


def workflow_shape(graph: BuiltGraph) -> WorkflowShape:
    """The structure of a built workflow."""
    return WorkflowShape(
        name=graph.name, takes=type_name(graph.takes), gives=type_name(graph.gives), body=_body(graph.body)
    )


def read_shape(text: str) -> WorkflowShape | None:
    """A structure from a store; None where there is none, or one that this version cannot read."""
    try:
        return WorkflowShape.model_validate_json(text) if text else None
    except ValidationError:
        return None


def _walk(body: tuple[StepShape, ...], around: StepPath) -> Iterator[tuple[str, StepShape]]:
    for step in body:
        path = around / step.name
        yield str(path), step
        yield from _walk(step.body, path)


def _body(body: BuiltBody) -> tuple[StepShape, ...]:
    return tuple(_step(node) for node in body.nodes)


def _step(node: BuiltNode) -> StepShape:
    kind: StepKind = "function"
    role, memory, rounds = "", False, 0
    inner: tuple[StepShape, ...] = ()
    match node.work:
        case RoleWork():
            kind, role, memory = "role", node.work.role.name, node.work.role.memory
        case LoopWork():
            kind, rounds, inner = "loop", node.work.max_rounds, _body(node.work.body)
        case GraphWork():
            kind, inner = "graph", _body(node.work.graph.body)
        case PersonWork():
            kind = "person"
        case FunctionWork():
            kind = "function"
    return StepShape(
        name=node.name,
        kind=kind,
        role=role,
        memory=memory,
        gives="" if kind == "loop" else type_name(node.gives),
        after=node.after,
        previous=tuple(node.reads_earlier),
        conditional=node.when is not None,
        each=node.each is not None,
        rounds=rounds,
        body=inner,
    )
