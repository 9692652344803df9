"""OpenAI's responses as they travel: a request in the words of a chat request, and how a response is written down."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from ....agents.messages import Usage
from ....agents.sampling import WrittenToken
from ....agents.thinking import ThinkingProfile
from .chat_protocol import (
    MAX_PRIORITY,
    AskOrigin,
    ChatMessage,
    ChatRequest,
    Completed,
    JsonSchema,
    Name,
    ResponseFormat,
    TextPart,
    text_of,
)
from .client_body import ClientBody
from .responses_tools import (
    FunctionCall,
    FunctionChoice,
    FunctionOutput,
    FunctionTool,
    call_items,
    chat_choice,
    chat_tools,
    message_of_calls,
    message_of_output,
    tool_block,
)
from .sampling_requests import token_blocks
from .thinking_requests import Reasoning
from .unserved_fields import RESPONSES, TEXT_OPTIONS

__all__ = ["ResponsesRequest", "message_item", "output_items", "response_object", "text_part"]


LOGPROBS = "message.output_text.logprobs"
"""What `include` says of them."""


class InputMessage(ClientBody):
    """One message; `id` and `status` are those of an earlier response that a client sends back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: Name | None = None
    status: Name | None = None
    phase: Name | None = None


class ReasoningItem(BaseModel):
    """The thought of an earlier response that a client sends back; as in chats, it is not asked with."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Literal["reasoning"]


def _kind(item: Any) -> Any:
    """The type of an item of the input; one without is a message."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")],
    Discriminator(_kind),
]
"""What was said before."""


class TextFormat(ClientBody):
    """How the answer is written."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(ClientBody):
    """What is said of the answer's text."""

    unserved = TEXT_OPTIONS

    format: TextFormat | None = None


class ResponsesRequest(ClientBody):
    """A response. What was said before is sent along, or kept under `previous_response_id`."""

    unserved = RESPONSES

    model: Name
    input: str | list[InputItem] = Field(min_length=1)
    instructions: str | None = None
    stream: bool | None = False
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[Name] = []
    """Log-probabilities come where they are included; thoughts always, and there is nothing else."""
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    thinking: ThinkingProfile | None = None
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    metier: AskOrigin | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    """Comes back with the response."""
    store: bool | None = None
    """Whether the response is kept; it is unless this says no."""
    previous_response_id: Name | None = None
    """A response that is kept, whose messages come before the input. Its instructions do not."""

    def said(self) -> list[ChatMessage]:
        """The messages of the input; calls that follow each other are one message."""
        if isinstance(self.input, str):
            return [ChatMessage(role="user", content=self.input)]
        messages: list[ChatMessage] = []
        for kind, items in groupby(self.input, type):
            if kind is FunctionCall:
                messages.append(message_of_calls([item for item in items if isinstance(item, FunctionCall)]))
                continue
            for item in items:
                if isinstance(item, FunctionOutput):
                    messages.append(message_of_output(item))
                elif isinstance(item, InputMessage):
                    messages.append(ChatMessage(role=item.role, content=text_of(item.content)))
        return messages

    def as_chat(self, earlier: Sequence[ChatMessage] = ()) -> ChatRequest:
        """The same as a chat request behind `earlier` messages; instructions are its system message."""
        messages = [*earlier, *self.said()]
        if self.instructions:
            messages.insert(0, ChatMessage(role="system", content=self.instructions))
        return ChatRequest(
            model=self.model,
            messages=messages,
            stream=bool(self.stream),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=True if LOGPROBS in self.include else None,
            top_logprobs=self.top_logprobs,
            reasoning=self.reasoning,
            response_format=self._format(),
            thinking=self.thinking,
            priority=self.priority,
            metier=self.metier,
            tools=chat_tools(self.tools or ()) or None,
            tool_choice=chat_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
        )

    def _format(self) -> ResponseFormat | None:
        asked = None if self.text is None else self.text.format
        if asked is None:
            return None
        schema = None if asked.schema_ is None else JsonSchema(name=asked.name, schema=asked.schema_)
        return ResponseFormat(type=asked.type, json_schema=schema)


def text_part(text: str, tokens: Sequence[WrittenToken] | None = None) -> dict[str, Any]:
    """The answer's text inside its message, with its tokens where they are reported."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": token_blocks(tokens or ())}


def message_item(id: str, text: str | None, tokens: Sequence[WrittenToken] | None = None) -> dict[str, Any]:
    """The message that an answer is; None has no text yet."""
    status = "in_progress" if text is None else "completed"
    content = [] if text is None else [text_part(text, tokens)]
    return {"type": "message", "id": id, "role": "assistant", "status": status, "content": content}


def output_items(id: str, done: Completed) -> list[dict[str, Any]]:
    """The answer or the calls, and after it what was thought."""
    items = call_items(done.calls) if done.calls else [message_item(f"msg_{id}", done.text, done.logprobs)]
    if done.thinking:
        thought = {"type": "reasoning_text", "text": done.thinking}
        item = {"type": "reasoning", "id": f"rs_{id}", "summary": [], "content": [thought], "status": "completed"}
        items.append(item)
    return items


def response_object(
    id: str, created: int, request: ResponsesRequest, done: Completed | None, kept: bool = False
) -> dict[str, Any]:
    """A whole response; without `done` as it begins. `kept` says whether it can be gone on from."""
    cut = done is not None and done.finish_reason == "length"
    status = "in_progress" if done is None else "incomplete" if cut else "completed"
    choice = request.tool_choice or ("auto" if request.tools else "none")
    format = request.text.format if request.text and request.text.format else TextFormat(type="text")
    return {
        "id": f"resp_{id}",
        "object": "response",
        "created_at": created,
        "status": status,
        "model": request.model,
        "output": [] if done is None else output_items(id, done),
        "usage": None if done is None else _usage(done.usage),
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "text": {"format": format.model_dump(by_alias=True, exclude_none=True)},
        "metadata": request.metadata or {},
        "parallel_tool_calls": bool(request.tools) and request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "store": kept,
        "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice,
        "tools": [tool_block(tool) for tool in request.tools or ()],
        "truncation": "disabled",
        "metier": {} if done is None else done.origin,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        # Nobody pays for what goes into the cache.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
        "total_tokens": usage.total_tokens,
        "metier": usage.model_dump(),
    }
