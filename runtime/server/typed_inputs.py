"""From the text of a message to what a workflow or a role takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from ...agents.graphs.nodes import BuiltGraph
from ...agents.roles import InputType, Role, type_name
from ...agents.said import json_object
from ...agents.turns import turns_field
from .error_replies import RequestRefused
from .strict_json import check_json

__all__ = ["role_inputs", "workflow_input"]


def workflow_input(graph: BuiltGraph, given: Any, max_depth: int, *, param: str = "messages") -> BaseModel:
    """What the workflow takes, from JSON data, JSON text, or plain text where it takes one text only.

    JSON text has `max_depth` levels at most.

    Raises: RequestRefused that shows the fields it has.
    """
    try:
        value: BaseModel = _read(graph.takes, given, max_depth)
        return value
    except ValueError as error:
        raise _misfit(f"workflow {graph.name!r}", _shape(graph.takes), error, param) from error


def role_inputs(role: Role, text: str, max_depth: int, *, param: str = "messages") -> dict[str, Any]:
    """A role's inputs by name, in the order it declares them.

    `text` is a JSON object with an entry for each; or, where the role needs one only, that one as JSON or as plain
    text. Raises: RequestRefused that shows the inputs it has.
    """
    try:
        data = json_object(text)
        if data is not None and data.keys() <= role.inputs.keys() and _needed(role.inputs) <= data.keys():
            check_json(text, max_depth)
            return {n: _read(t.type, data[n], max_depth) for n, t in role.inputs.items() if data.get(n) is not None}
        needed = _needed(role.inputs) or set(list(role.inputs)[:1])
        if len(needed) == 1:
            (name,) = needed
            return {name: _read(role.inputs[name].type, text, max_depth)}
        raise ValueError(f"it needs {len(needed)} inputs")
    except ValueError as error:
        shape = "{" + ", ".join(f'"{n}": {_shape(t.type)}' for n, t in role.inputs.items()) + "}"
        raise _misfit(f"role {role.name!r}", shape, error, param) from error


def _needed(inputs: Mapping[str, InputType]) -> set[str]:
    return {name for name, wanted in inputs.items() if not wanted.optional}


def _read(kind: Any, given: Any, max_depth: int) -> Any:
    """A value of a type; text may be JSON of it, or stand for the only field of a model when that is text.

    Raises: ValueError, also for numbers that are not finite: no run could be recorded with them.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    if kind is str or not isinstance(given, str):
        return _finite(adapter, adapter.validate_python(given))
    try:
        check_json(given, max_depth)
        return _finite(adapter, adapter.validate_json(given))
    except ValueError:
        only = _only_text_field(kind)
        if only is None or json_object(given) is not None:
            raise
        return kind.model_validate({only: given})


def _finite(adapter: TypeAdapter[Any], value: Any) -> Any:
    left = [adapter.dump_python(value)]
    while left:
        one = left.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"{one} is no finite number")
        if isinstance(one, dict):
            left.extend(one.values())
        elif isinstance(one, list | tuple | set | frozenset):
            left.extend(one)
    return value


def _only_text_field(kind: Any) -> str | None:
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return None
    turns = turns_field(kind)
    fields = [(name, field) for name, field in kind.model_fields.items() if name != turns]
    return fields[0][0] if len(fields) == 1 and fields[0][1].annotation is str else None


def _shape(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "{" + ", ".join(f'"{n}": {type_name(f.annotation)}' for n, f in kind.model_fields.items()) + "}"
    return type_name(kind)


def _misfit(what: str, shape: str, error: ValueError, param: str) -> RequestRefused:
    reason = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    return RequestRefused(f"the input does not fit {what}: {reason}", code="invalid_input", param=param, expected=shape)
