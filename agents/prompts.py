"""The prompt layout: how a role and its inputs become messages, and how a run's input becomes the task's text.

The layout is fixed and versioned, because an adapter is only good at the layout it was trained with. What
roles and rounds share comes first and the role's own text last, so that prompts share prefixes in the
engine's cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter

from .messages import Message
from .roles import Role, type_name
from .tools.calls import describe_tools
from .tools.tool import Tool

__all__ = ["PROMPT_LAYOUT", "TASK_TEXT_RULE", "render_prompt", "render_value", "task_text", "task_text_of_json"]

PROMPT_LAYOUT = 1
TASK_TEXT_RULE = "task-input/1"
"""Name of `task_text`'s rule. An adapter stores the rule it was trained with; another rule gets another name."""
SYSTEM = "You are one specialist in a team. Do only your own step."
HINTS_KEPT = 1000
"""Answer types whose format hint is kept written; every ask of a role has the same."""

_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


def render_prompt(role: Role, inputs: Mapping[str, Any], tools: Iterable[Tool] = ()) -> tuple[Message, ...]:
    """Turn a role and its inputs into the messages of one ask.

    Inputs are written in the order given (callers put the task's own input first); those that are None are
    left out. The role's name, instructions and answer format come last. The role's examples are turns before that,
    the same in every ask, so that the prefix cache has them. `tools` are those the role may call, where it has some.
    """
    parts = [f"# {name}\n{render_value(value)}" for name, value in inputs.items() if value is not None]
    task = role.render_instructions(inputs)
    told, hint = describe_tools(tools), _format_hint(role.gives)
    if told and not hint:
        hint = "Reply as a JSON string."
    parts.append("\n".join(line for line in (f"# Your step: {role.name}", task, told, hint) if line))
    ask = Message(role="user", content="\n\n".join(parts))
    return (Message(role="system", content=SYSTEM), *role.examples, ask)


def render_value(value: Any) -> str:
    """Write one input for a prompt: text as it is, a model as `field: value` lines, other values as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        if len(fields) == 1:
            return render_value(next(iter(fields.values())))
        return "\n".join(f"{name}: {render_value(v)}" for name, v in fields.items() if v not in (None, ""))
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return "\n".join(f"- {render_value(v)}" for v in value)
    if isinstance(value, set | frozenset):  # in one order in every process, or a resumed run would ask something else
        value = sorted(value, key=_ANYTHING.dump_json)
    return _ANYTHING.dump_json(value).decode()


@lru_cache(HINTS_KEPT)
def _format_hint(gives: type[Any]) -> str:
    if gives is str:
        return ""
    fields = ", ".join(f'"{n}": {_json_word(f.annotation)}' for n, f in gives.model_fields.items())
    return f"Reply as JSON: {{{fields}}}"


def _json_word(annotation: Any) -> str:
    words = {str: "string", int: "integer", float: "number", bool: "true or false"}
    if get_origin(annotation) is list:
        return f"[{_json_word(get_args(annotation)[0])}, …]"
    return words.get(annotation, type_name(annotation))


def task_text(value: BaseModel) -> str:
    """A run's typed input as text: the one field of a model that has a single text field, else its compact JSON."""
    return task_text_of_json(value.model_dump_json())


def task_text_of_json(text: str) -> str:
    """The same for an input that is kept as JSON, as the run store keeps it."""
    data = json.loads(text)
    if isinstance(data, dict) and len(data) == 1:
        (only,) = data.values()
        if isinstance(only, str):
            return only
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
