"""How a model calls tools: what it is told of them, the JSON it writes, and how the results come back to it.

A reply of a role with tools is either `{"tool_calls": [{"name": …, "arguments": {…}}]}` or the role's answer. Both are
one JSON schema, so that an engine's grammar leaves the model nothing else to write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from ..frozen_model import FrozenModel
from .tool import Tool

__all__ = [
    "CALLS",
    "CallAnswer",
    "ToolCall",
    "ToolCalls",
    "describe_tools",
    "read_calls",
    "read_text_answer",
    "results_text",
    "turn_schema",
]

CALLS = "tool_calls"
"""The field that makes a reply a call. No answer type of a role with tools may have it."""

SHOWN_CHARACTERS = 400
"""Of a schema that is too nested for a signature, how much of its JSON is shown."""

_TEXT = {"type": "string"}


class ToolCall(FrozenModel):
    """One call that a model wants made.

    >>> ToolCall(name="calculator", arguments={"expression": "6 * 7"}).name
    'calculator'
    """

    name: str
    """Name of the tool."""

    arguments: dict[str, Any] = {}
    """Its arguments, as JSON."""


class ToolCalls(FrozenModel):
    """A reply that calls tools: all of its calls are made at once.

    >>> ToolCalls(tool_calls=(ToolCall(name="now"),)).model_dump_json()
    '{"tool_calls":[{"name":"now","arguments":{}}]}'
    """

    tool_calls: tuple[ToolCall, ...]
    """The calls, in the order they were written."""


class CallAnswer(FrozenModel):
    """What a person says of a call that was begun, must not be repeated, and whose result is not known."""

    result: str = "done"
    """What the model is told that the call gave."""

    call_again: bool = False
    """Whether to make the call once more, because it was not done."""


def turn_schema(
    tools: Iterable[Tool], answer: Mapping[str, Any] | None, calls_left: int, *, must_call: bool = False
) -> dict[str, Any]:
    """JSON schema of a reply: at most `calls_left` calls of these tools, or an answer of schema `answer`.

    Free text (None) is a JSON string here, since text has no schema that a call could be told from. With `must_call`
    the reply can only be calls.
    """
    answer = _TEXT if answer is None else answer
    tools = tuple(tools)
    if not tools or calls_left < 1:
        return dict(answer)
    definitions: dict[str, Any] = {}
    calls = []
    for number, each in enumerate(tools):
        place = f"tool{number}"
        definitions[place] = _moved(each.parameters, place)
        name_and_arguments = {"name": {"const": each.name}, "arguments": {"$ref": f"#/$defs/{place}"}}
        calls.append(_object(name_and_arguments))
    several = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": calls_left}
    if must_call:
        return {**_object({CALLS: several}), "$defs": definitions}
    definitions["answer"] = _moved(answer, "answer")
    return {"anyOf": [_object({CALLS: several}), {"$ref": "#/$defs/answer"}], "$defs": definitions}


def read_calls(text: str) -> ToolCalls | None:
    """The calls of a reply; None when it holds none, or none that can be read."""
    if f'"{CALLS}"' not in text:
        return None
    begins, ends = text.find("{"), text.rfind("}")
    try:
        found = from_json(text[begins : ends + 1])
        return ToolCalls.model_validate({CALLS: found[CALLS]}) if isinstance(found, dict) else None
    except (KeyError, ValueError, ValidationError):
        return None


def read_text_answer(text: str) -> str:
    """A free text that was written as a JSON string, as `turn_schema` asks for it; other text as it is."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, str) else text


def results_text(results: Sequence[tuple[str, str]], calls_left: int) -> str:
    """What the model is told of its calls: (tool, result) of each in their order, and whether it may call more."""
    lines = [f"{number}. {name}: {text}" for number, (name, text) in enumerate(results, 1)]
    if calls_left < 1:
        lines.append("No calls are left: reply with the answer.")
    return "\n".join(["Results:", *lines])


def describe_tools(tools: Iterable[Tool]) -> str:
    """What a prompt says of a role's tools; "" without any."""
    lines = [f"- {_signature(each)}" + (f": {each.description}" if each.description else "") for each in tools]
    if not lines:
        return ""
    call = f'{{"{CALLS}": [{{"name": …, "arguments": {{…}}}}]}}'
    return "\n".join(["You may call tools:", *lines, f"To call, reply as JSON: {call}", "To answer:"])


def _signature(each: Tool) -> str:
    properties, required = each.parameters.get("properties"), each.parameters.get("required")
    properties = properties if isinstance(properties, dict) else {}
    required = required if isinstance(required, list) else []
    shown = (
        f"{name}{'' if name in required else '?'}: {_kind(schema, each.parameters)}"
        for name, schema in properties.items()
    )
    return f"{each.name}({', '.join(shown)})"


def _kind(schema: Any, whole: Mapping[str, Any]) -> str:
    """A schema in a word or two: `string`, `[integer, …]`, `"a" | "b"`; what is nested as its JSON, shortened."""
    if not isinstance(schema, dict):
        return "anything"
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
    said = f" ({schema['description']})" if schema.get("description") else ""
    if isinstance(schema.get("anyOf"), list):
        return " | ".join(_kind(one, whole) for one in schema["anyOf"]) + said
    kind = schema.get("type")
    if kind == "array":
        return f"[{_kind(schema.get('items', {}), whole)}, …]{said}"
    if isinstance(kind, str) and kind != "object":
        return kind + said
    if kind == "object" and not schema.get("properties"):
        return f"object{said}"
    reference = str(schema.get("$ref", ""))
    definitions = whole.get("$defs")
    known = definitions if isinstance(definitions, dict) else {}
    nested = known.get(reference.removeprefix("#/$defs/"), schema)
    text = json.dumps(nested, ensure_ascii=False)
    return (text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…") + said


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at `#/$defs/{place}` of another one: what it refers to within itself is there too."""
    if isinstance(schema, Mapping):
        return {
            name: f"#/$defs/{place}{value[1:]}"
            if name == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for name, value in schema.items()
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema
