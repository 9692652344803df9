"""The workflow of a conversation: one whose input has room for the turns before, made of a role where one is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..errors import GraphError
from ..roles import InputType, Role
from ..turns import Turn, holds_turns, turns_field
from .graph import TaskGraph
from .nodes import BuiltGraph

__all__ = ["conversation_graph"]


def conversation_graph(speaker: Role | TaskGraph | BuiltGraph) -> BuiltGraph:
    """What is run for each turn: the workflow itself, or the one step of a role.

    Raises: GraphError for a workflow whose input has no field for turns or several, and for a role that takes nothing.
    """
    graph = _of_role(speaker) if isinstance(speaker, Role) else speaker
    built = graph.build() if isinstance(graph, TaskGraph) else graph
    if not isinstance(built, BuiltGraph):
        raise GraphError(f"a conversation with {built!r}", expected="a Role, or a TaskGraph")
    if turns_field(built.takes) is None:
        raise GraphError(
            f"graph {built.name!r} takes {built.takes.__name__}, which has no field for the earlier turns",
            expected="a conversation's input, in which a field holds them",
            remedy=f"Add `earlier: list[Turn] = []` to {built.takes.__name__} (from metier.agents import Turn), or "
            "talk with one role of the graph.",
        )
    fields = [name for name, field in built.takes.model_fields.items() if holds_turns(field.annotation)]
    if len(fields) > 1:
        raise GraphError(
            f"{built.takes.__name__} has the fields {', '.join(fields)}, each of which could hold the earlier turns",
            expected="one field of type list[Turn]",
        )
    return built


def _of_role(role: Role) -> TaskGraph:
    needed = {name: wanted.type for name, wanted in role.inputs.items() if not wanted.optional}
    needed = needed or {name: wanted.type for name, wanted in list(role.inputs.items())[:1]}
    said = {name: kind for name, kind in needed.items() if not holds_turns(kind)}
    if not said:
        raise GraphError(
            f"role {role.name!r} takes nothing that could be said to it",
            expected="an input, such as takes={'message': str}",
        )
    (only, *others) = said.values()
    if not others and turns_field(only) is not None:
        graph = TaskGraph(role.name, takes=only, gives=role.gives)
        graph.step(role)
        return graph
    turns = next((name for name, wanted in role.inputs.items() if holds_turns(wanted.type)), None) or _free(role)
    fields: dict[str, Any] = {name: (kind, ...) for name, kind in said.items()}
    fields[turns] = (list[Turn], Field(default=[]))
    takes: type[BaseModel] = create_model(
        f"{role.name.title().replace('-', '').replace('_', '')}Turn",
        __config__=ConfigDict(extra="forbid", protected_namespaces=()),
        **fields,
    )
    declared = {name: _declared(wanted) for name, wanted in role.inputs.items()} | {**said, turns: list[Turn]}
    graph = TaskGraph(role.name, takes=takes, gives=role.gives)
    graph.step(
        replace(role, takes=declared),
        inputs={name: graph.input.field(name) for name in (*said, turns)},
    )
    return graph


def _declared(wanted: InputType) -> Any:
    return wanted.type | None if wanted.optional else wanted.type


def _free(role: Role) -> str:
    """A name for the turns that no input of the role has."""
    name = "earlier"
    while name in role.inputs:
        name += "_turns"
    return name
