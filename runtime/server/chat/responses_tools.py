"""Tools of a client in the words of /v1/responses: functions, calls and their results as items of input and output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from .chat_protocol import ChatMessage, Name, TextPart, text_of
from .client_body import ClientBody
from .tool_requests import CalledFunction, ClientFunction, ClientTool, MessageCall, NamedFunction, NamedTool, ToolChoice
from .unserved_fields import CALL

__all__ = [
    "FunctionCall", "FunctionChoice", "FunctionOutput", "FunctionTool", "call_items", "chat_choice", "chat_tools",
    "message_of_calls", "message_of_output", "tool_block",
]  # fmt: skip


class FunctionTool(ClientBody):
    """A tool of the client's: the fields of `ClientFunction`."""

    unserved = CALL

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(ClientBody):
    """The one tool that must be called."""

    unserved = CALL

    type: Literal["function"]
    name: Name


class FunctionCall(ClientBody):
    """A call of an earlier response, which the client sends back; `id` and `status` are that item's."""

    unserved = CALL

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str
    """As JSON text."""
    id: Name | None = None
    status: Name | None = None


class FunctionOutput(ClientBody):
    """The result of a call."""

    unserved = CALL

    type: Literal["function_call_output"]
    call_id: Name
    output: str | list[TextPart]
    id: Name | None = None
    status: Name | None = None


def chat_tools(tools: Iterable[FunctionTool]) -> list[ClientTool]:
    """Tools as a chat request has them."""
    return [
        ClientTool(type="function", function=ClientFunction(**tool.model_dump(exclude={"type"}, exclude_none=True)))
        for tool in tools
    ]


def chat_choice(choice: Literal["none", "auto", "required"] | FunctionChoice | None) -> ToolChoice | None:
    """What must be called, as a chat request has it."""
    if isinstance(choice, FunctionChoice):
        return NamedTool(type="function", function=NamedFunction(name=choice.name))
    return choice


def tool_block(tool: FunctionTool) -> dict[str, Any]:
    """A tool as a response repeats it."""
    none_given = {"description": None, "parameters": None, "strict": True}
    return none_given | tool.model_dump(exclude_none=True)


def message_of_calls(calls: Sequence[FunctionCall]) -> ChatMessage:
    """Calls that follow each other as the message of the reply that made them."""
    return ChatMessage(
        role="assistant",
        tool_calls=[
            MessageCall(id=call.call_id, function=CalledFunction(name=call.name, arguments=call.arguments))
            for call in calls
        ],
    )


def message_of_output(output: FunctionOutput) -> ChatMessage:
    """A result as a chat request has it."""
    return ChatMessage(role="tool", tool_call_id=output.call_id, content=text_of(output.output))


def call_items(calls: Iterable[dict[str, Any]], *, begun: bool = False) -> list[dict[str, Any]]:
    """Calls of a reply as items of the output; `begun` without their arguments, as a stream announces them."""
    return [
        {
            "type": "function_call",
            "id": f"fc_{call['id'].removeprefix('call_')}",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": "" if begun else call["function"]["arguments"],
            "status": "in_progress" if begun else "completed",
        }
        for call in calls
    ]
