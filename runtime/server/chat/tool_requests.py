"""Tools that a client brings: it is told the calls that the model wants, makes them, and sends their results.

On the wire they have OpenAI's shape. The model sees what a role with tools sees: the tools described, its calls as JSON
by grammar, their results as the next message of the user.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ....agents.answers.held_schema import held_schema
from ....agents.errors import GraphError
from ....agents.messages import Message
from ....agents.tools.calls import (
    ToolCall,
    ToolCalls,
    describe_tools,
    read_calls,
    read_text_answer,
    results_text,
    turn_schema,
)
from ....agents.tools.declared import check_names
from ....agents.tools.tool import Tool, first_paragraph
from ..error_replies import RequestRefused
from .client_body import ClientBody
from .unserved_fields import CALL

__all__ = [
    "AskedTools", "CalledFunction", "ClientFunction", "ClientTool", "MessageCall", "NamedFunction", "NamedTool",
    "ToolChoice", "asked_tools", "call_message", "results_message",
]  # fmt: skip

Text = Annotated[str, Field(max_length=200)]


class _OfTools(ClientBody):
    unserved = CALL


class ClientFunction(_OfTools):
    """A function of the client's."""

    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments; without one it takes none."""
    strict: bool | None = None
    """Accepted for clients that send it: arguments always fit their schema here."""


class ClientTool(_OfTools):
    """A tool of the client's."""

    type: Literal["function"]
    function: ClientFunction


class NamedFunction(_OfTools):
    """The function that must be called."""

    name: Text


class NamedTool(_OfTools):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
"""Whether the model may call, must call, or must call one tool."""


class CalledFunction(_OfTools):
    """What an earlier reply called."""

    name: Text
    arguments: str
    """As JSON text."""


class MessageCall(_OfTools):
    """A call of an earlier reply, which the client sends back."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


@dataclass(frozen=True)
class AskedTools:
    """The tools that a reply may call."""

    tools: tuple[Tool, ...]
    must_call: bool
    most: int
    """Calls that one reply may have."""

    def schema(self, answer: dict[str, Any] | None) -> dict[str, Any]:
        """Schema of the reply, where an answer has the schema `answer` (None is free text)."""
        return turn_schema(self.tools, answer, self.most, must_call=self.must_call)

    def told(self, messages: Sequence[Message], answer: dict[str, Any] | None) -> tuple[Message, ...]:
        """Messages to a variant, with the tools described in that of the system."""
        how = "Reply as a JSON string." if answer is None else "Reply as JSON as you were asked to."
        about = f"{describe_tools(self.tools)}\n{how}"
        if messages[0].role != "system":
            return (Message(role="system", content=about), *messages)
        first = messages[0].model_copy(update={"content": f"{messages[0].content}\n\n{about}"})
        return (first, *messages[1:])

    def read(self, text: str, free_text: bool) -> tuple[str, tuple[dict[str, Any], ...]]:
        """A reply's text and its calls in OpenAI's shape; of the two one is empty."""
        calls = read_calls(text)
        if calls is None:
            return read_text_answer(text) if free_text else text, ()
        return "", tuple(_call_block(call) for call in calls.tool_calls)


def asked_tools(
    tools: Sequence[ClientTool] | None, choice: ToolChoice | None, parallel: bool | None, most_tools: int, most: int
) -> AskedTools | None:
    """What a request's `tools`, `tool_choice` and `parallel_tool_calls` come to; None where nothing may be called.

    Raises: RequestRefused for tools that cannot be called, more than `most_tools`, or a choice that is none of them.
    """
    found = tuple(_tool(each.function) for each in tools or ())
    if len(found) > most_tools:
        raise _refused(
            f"{len(found)} tools", expected=f"at most {most_tools}", remedy="Send fewer, or raise server.tools."
        )
    try:
        check_names((each.name for each in found), "the request")
    except GraphError as error:
        raise _refused(error.problem, expected=error.expected) from error
    if isinstance(choice, NamedTool):
        named = tuple(each for each in found if each.name == choice.function.name)
        if not named:
            known = ", ".join(each.name for each in found) or "none"
            raise _refused(f"tool_choice names {choice.function.name!r}", expected=f"one of the tools: {known}")
        found = named
    if choice not in (None, "none", "auto") and not found:
        raise _refused(f"tool_choice {choice!r} without tools", expected="tools to choose from")
    if not found or choice == "none":
        return None
    return AskedTools(found, choice not in (None, "auto"), 1 if parallel is False else most)


def call_message(calls: Sequence[MessageCall]) -> Message:
    """What an earlier reply with these calls was, as the model wrote it; raises RequestRefused for odd arguments."""
    made = []
    for call in calls:
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except ValueError as error:
            raise _refused(f"the arguments of call {call.id!r} are no JSON: {error}", param="messages") from error
        if not isinstance(arguments, dict):
            raise _refused(
                f"the arguments of call {call.id!r} are {call.function.arguments[:100]}",
                param="messages",
                expected="a JSON object as text",
            )
        made.append(ToolCall(name=call.function.name, arguments=arguments))
    return Message(role="assistant", content=ToolCalls(tool_calls=tuple(made)).model_dump_json())


def results_message(calls: Sequence[MessageCall], results: Sequence[tuple[str | None, str]]) -> Message:
    """The results, (id of the call, text) of each, of the calls before them, in the order of the calls.

    Raises: RequestRefused when they are not the results of these calls.
    """
    by_id = dict(results)
    if len(by_id) != len(results) or by_id.keys() != {call.id for call in calls}:
        raise _refused(
            f"results of the calls {', '.join(str(id) for id, _ in results)}",
            param="messages",
            expected=f"one for each call of the message before: {', '.join(call.id for call in calls) or 'none'}",
        )
    return Message(role="user", content=results_text([(call.function.name, by_id[call.id]) for call in calls], 1))


def _tool(function: ClientFunction) -> Tool:
    parameters = function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    if parameters.get("type", "object") != "object":
        raise _refused(f"the arguments of tool {function.name!r} are no object", expected='{"type": "object", …}')
    try:
        return Tool(function.name, first_paragraph(function.description or ""), held_schema(parameters), _not_ours)
    except GraphError as error:
        raise _refused(error.problem, expected=error.expected) from error
    except (AttributeError, TypeError, KeyError) as error:
        raise _refused(
            f"the arguments of tool {function.name!r} have no JSON schema", expected="a JSON schema"
        ) from error


def _not_ours() -> None:
    raise AssertionError("the client makes its calls itself")


def _call_block(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _refused(problem: str, *, param: str = "tools", expected: str = "", remedy: str = "") -> RequestRefused:
    return RequestRefused(problem, param=param, expected=expected, remedy=remedy)
