"""The prompt layout: how a role and its inputs become messages, and how a run's input becomes the task's text.

The layout is fixed and versioned, because an adapter is only good at the layout it was trained with. What
roles and rounds share comes first and the role's own text last, so that prompts share prefixes in the
engine's cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from .answers.answer_shape import answer_shape
from .messages import Message
from .recorded_values import as_json
from .roles import Role
from .tools.calls import describe_tools
from .tools.tool import Tool
from .turns import Turn, holds_turns, turn_messages, turns_field, turns_in

__all__ = [
    "PROMPT_LAYOUT", "TASK_TEXT_RULE", "layout_of", "prompt_layout", "render_prompt", "render_value", "task_text",
    "task_text_of_json",
]  # fmt: skip

PROMPT_LAYOUT = 2
"""The newest layout. Of an ask the first layout counts that has its text (`prompt_layout`): layout 2 writes the shapes
of answers in full, and is the same as layout 1 for answers of text, numbers and lists of them. A variant serves asks of
its own layout and of earlier ones."""
TASK_TEXT_RULE = "task-input/1"
"""Name of `task_text`'s rule. An adapter stores the rule it was trained with; another rule gets another name."""
SYSTEM = "You are one specialist in a team. Do only your own step."
PLAIN_HINT = "Reply as JSON: "
SHAPE_HINT = "Reply as JSON of this shape: "


def render_prompt(
    role: Role, inputs: Mapping[str, Any], tools: Iterable[Tool] = (), remembered: Iterable[Turn] = ()
) -> tuple[Message, ...]:
    """Turn a role and its inputs into the messages of one ask.

    Inputs are written in the order given (callers put the task's own input first); those that are None are
    left out. The role's name, instructions and answer format come last. The role's examples are turns before that,
    the same in every ask, so that the prefix cache has them. Turns among the inputs are messages too, behind the
    examples, and so are those that the role has `remembered`, behind them. `tools` are those the role may call, where
    it has some.
    """
    shown = {name: value for name, value in inputs.items() if not _is_turns(role, name)}
    parts = [f"# {name}\n{render_value(value)}" for name, value in shown.items() if value is not None]
    task = role.render_instructions(inputs)
    told, hint = describe_tools(tools), _format_hint(role.gives)
    if told and not hint:
        hint = "Reply as a JSON string."
    parts.append("\n".join(line for line in (f"# Your step: {role.name}", task, told, hint) if line))
    ask = Message(role="user", content="\n\n".join(parts))
    turns = turn_messages([*turns_in(inputs), *remembered])
    return (Message(role="system", content=SYSTEM), *role.examples, *turns, ask)


def render_value(value: Any) -> str:
    """Write one input for a prompt: text as it is, a model as `field: value` lines, other values as JSON.

    A model's turns are left out: they are messages.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        turns = turns_field(type(value))
        fields = {name: getattr(value, name) for name in type(value).model_fields if name != turns}
        if len(fields) == 1:
            return render_value(next(iter(fields.values())))
        return "\n".join(f"{name}: {render_value(v)}" for name, v in fields.items() if v not in (None, ""))
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return "\n".join(f"- {render_value(v)}" for v in value)
    if isinstance(value, set | frozenset):  # in one order in every process, or a resumed run would ask something else
        value = sorted(value, key=as_json)
    return as_json(value)


def _is_turns(role: Role, name: str) -> bool:
    return name in role.inputs and holds_turns(role.inputs[name].type)


def prompt_layout(gives: Any) -> int:
    """The first layout that has the text in which a role with this answer type asks."""
    return 1 if gives is str or answer_shape(gives).plain else 2


def layout_of(messages: Iterable[Message]) -> int:
    """The layout of rendered messages, as `prompt_layout` numbers it; 1 for messages that this module did not write."""
    written = (message.content.rpartition("\n")[2] for message in messages if message.role == "user")
    return 2 if any(line.startswith(SHAPE_HINT) for line in written) else 1


def _format_hint(gives: Any) -> str:
    if gives is str:
        return ""
    shape = answer_shape(gives)
    return (PLAIN_HINT if shape.plain else SHAPE_HINT) + shape.text


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
