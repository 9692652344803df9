"""A tool that a role may call: a function with a name, a description, and the JSON schema of its arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError

from ..errors import GraphError, ToolError

__all__ = ["DEFAULT_TIMEOUT_S", "MOST_RESULT_CHARACTERS", "Tool", "first_paragraph", "result_text", "tool"]

DEFAULT_TIMEOUT_S = 30.0
MOST_RESULT_CHARACTERS = 4000
"""Of a tool's result, how much a model is told, where settings do not say otherwise."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


@dataclass(frozen=True)
class Tool:
    """A tool as a role has it: made of a typed function by `tool`, or of what an MCP server lists.

    `function` takes the arguments by name and may be async; others run in a worker thread. `read` makes of the
    arguments that a model wrote those of the function, and raises ToolError for those that do not fit `parameters`,
    their JSON schema.

    A call that takes longer than `timeout_s` seconds is given up. With `repeat=False` a call that was begun is never
    made again by itself: a run that was killed within it asks a person. `replay=False` is for a tool that changes the
    world or reads what changes: `metier probe` calls it each time, where it takes other equal calls from its journal.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    timeout_s: float = DEFAULT_TIMEOUT_S
    repeat: bool = True
    replay: bool = True

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise GraphError(
                f"tool name {self.name!r} cannot be written in a call",
                expected="at most 128 letters, digits, '_', '-' and '.'",
                remedy="Give it a name: tool(function, name='…').",
            )
        if not self.timeout_s > 0:
            raise GraphError(f"tool {self.name!r} has timeout_s={self.timeout_s}", expected="more than 0 seconds")


def tool(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    repeat: bool = True,
    replay: bool = True,
) -> Tool:
    """Make a tool of a typed function; its docstring is the description, its annotations are the arguments' schema.

    Raises: GraphError for a function without a name, with an argument that has no annotation or cannot be given by
    name, or of a type that has no JSON schema.

    >>> def look_up(word: str, most: int = 3) -> list[str]:
    ...     "Finds a word in the dictionary."
    ...     return [word][:most]
    >>> found = tool(look_up)
    >>> found.name, found.description, list(found.parameters["properties"])
    ('look_up', 'Finds a word in the dictionary.', ['word', 'most'])
    """
    name = str(name or getattr(function, "__name__", ""))
    arguments = _arguments_model(function, name)
    try:
        parameters = arguments.model_json_schema()
    except PydanticInvalidForJsonSchema as error:
        raise GraphError(
            f"the arguments of tool {name!r} have no JSON schema: {error}",
            expected="types that can be written as JSON",
            remedy="Take text or numbers, and make the object of them in the tool.",
        ) from error

    def read(written: Mapping[str, Any]) -> dict[str, Any]:
        try:
            given = arguments.model_validate(written)
        except ValidationError as error:
            raise ToolError(f"arguments do not fit: {_reasons(error)}") from error
        return {field: getattr(given, field) for field in arguments.model_fields}

    said = inspect.getdoc(function) or "" if description is None else description
    return Tool(name, first_paragraph(said), parameters, function, read, timeout_s, repeat, replay)


def _arguments_model(function: Callable[..., Any], name: str) -> type[BaseModel]:
    """A pydantic model with a field for each argument of a function."""
    try:
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise GraphError(
            f"the arguments of tool {name or function!r} cannot be read: {error}",
            expected="a function whose annotations exist where it is defined",
            remedy="Define the types at the top level of the module; wrap a built-in in a function of your own.",
        ) from error
    fields: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not named or parameter.name.startswith("_"):
            raise GraphError(
                f"argument {parameter.name!r} of tool {name!r} cannot be given by name",
                expected="plain arguments, each with a type and a name that does not begin with '_'",
                remedy="Write the arguments out, or take a list.",
            )
        if parameter.name not in hints:
            raise GraphError(
                f"argument {parameter.name!r} of tool {name!r} has no annotation",
                expected="a type for every argument: the model is told what to write by it",
                remedy=f"Write {parameter.name}: str, or whatever it is.",
            )
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    try:
        return create_model(f"{name}_arguments", __config__=ConfigDict(extra="forbid"), **fields)
    except (NameError, TypeError, PydanticUserError) as error:
        raise GraphError(
            f"the arguments of tool {name!r} cannot be read: {error}",
            expected="types that pydantic can validate",
            remedy="Rename the argument, or take text or numbers instead.",
        ) from error


def _reasons(error: ValidationError) -> str:
    first = error.errors(include_url=False)[:3]
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'all'}: {each['msg']}" for each in first)


def first_paragraph(text: str) -> str:
    """What a model is told of a tool: the first paragraph of what is written about it, on one line."""
    return text.strip().partition("\n\n")[0].replace("\n", " ")


def result_text(result: Any) -> str:
    """What a tool gave, as the model reads it: text as it is, anything else as JSON."""
    return result if isinstance(result, str) else _ANYTHING.dump_json(result).decode()
