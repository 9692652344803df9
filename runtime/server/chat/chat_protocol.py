"""OpenAI's chat completions as they travel: what a request may say, and how replies are written down."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ....agents.messages import Message, Usage
from ....agents.sampling import WrittenToken
from ....agents.thinking import ThinkingProfile
from ..error_replies import RequestRefused
from .client_body import ClientBody
from .sampling_requests import SampledRequest, logprobs_block
from .thinking_requests import Effort, Reasoning, TemplateOptions
from .tool_requests import ClientTool, MessageCall, ToolChoice, call_message, results_message
from .unserved_fields import CHAT, MESSAGE, PART

__all__ = [
    "AskOrigin",
    "ChatRequest",
    "Completed",
    "chunk",
    "completion",
    "text_of",
    "text_of",
    "to_messages",
    "usage_block",
]

MAX_PRIORITY = 2**31 - 1
MAX_NAME = 200
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")

Name = Annotated[str, Field(max_length=MAX_NAME)]


class TextPart(ClientBody):
    """A piece of a message's content: text, or the refusal of an earlier answer, which is its text too."""

    unserved = PART

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str = ""
    refusal: str = ""

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, given: Any) -> Any:
        kind = given.get("type", "text") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind not in TEXT_PARTS:
            raise RequestRefused(
                f"a piece of content of type {kind[:MAX_NAME]!r}: the models served here read text only",
                param="messages",
                code="unsupported_content",
                expected="pieces of type text",
                remedy="Say in text what is in it.",
            )
        return given


class ChatMessage(ClientBody):
    """One message; `developer` is OpenAI's newer word for `system`. Messages that replies gave are taken back."""

    unserved = MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    """None for calls alone."""
    tool_calls: list[MessageCall] | None = None
    """What an earlier reply called; only of the assistant."""
    tool_call_id: Name | None = None
    """Of which call this is the result; only of a tool."""
    refusal: str | None = None
    """What an earlier reply said instead of an answer, where it has no content."""


class JsonSchema(ClientBody):
    """The schema that an answer has to keep to."""

    name: Name = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(ClientBody):
    """How the answer is written."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """The schema of a json_object, as some clients send it."""


class StreamOptions(ClientBody):
    """What a stream carries beside text."""

    include_usage: bool = False
    """Whether a last piece carries the usage."""
    include_obfuscation: bool | None = None
    """Accepted for clients that send it; has no effect."""


class AskOrigin(ClientBody):
    """Where an ask comes from, said by a metier that asks another one: see `Ask`."""

    run_id: Name = ""
    step_path: Name = ""
    role: Name = ""
    round: int = Field(default=1, ge=1, le=1_000_000)
    attempt: int = Field(default=0, ge=0, le=1_000_000)
    prompt_layout: int = Field(default=1, ge=0, le=1_000_000)
    task: str = ""


class ChatRequest(SampledRequest):
    """A chat completion. `thinking`, `priority` and `metier` are ours.

    `thinking` is a number of tokens, `off`, or `{max_tokens, min_tokens, waits}`. A lower `priority` goes first.
    """

    unserved = CHAT

    model: Name
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat | None = None
    thinking: ThinkingProfile | None = None
    reasoning_effort: Effort | None = None
    """Stands for the thinking that the setting `server.efforts` says."""
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateOptions | None = None
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    metier: AskOrigin | None = None
    tools: list[ClientTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True)
class Completed:
    """What became of a request; `origin` says what served it."""

    text: str
    thinking: str = ""
    finish_reason: str = "stop"
    usage: Usage = field(default_factory=Usage)
    origin: dict[str, Any] = field(default_factory=dict)
    logprobs: tuple[WrittenToken, ...] | None = None
    """Tokens of the answer, where they were asked for."""
    calls: tuple[dict[str, Any], ...] = ()
    """Calls that the client is to make, as they travel; the text is then empty."""


def to_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The messages of a request as an ask has them: calls as the model wrote them, their results as one message.

    Raises: RequestRefused for results that belong to no call, calls without results, and messages without content.
    """
    made: list[Message] = []
    open_calls: Sequence[MessageCall] = ()
    results: list[tuple[str | None, str]] = []
    for message in (*messages, None):
        if message is not None and message.role == "tool":
            results.append((message.tool_call_id, _text(message)))
            continue
        if open_calls or results:
            made.append(results_message(open_calls, results))
        open_calls, results = (), []
        if message is not None and message.tool_calls and message.role == "assistant":
            open_calls = message.tool_calls
            made.append(call_message(open_calls))
        elif message is not None:
            role = "system" if message.role == "developer" else message.role
            made.append(Message(role=role, content=_text(message)))
    return tuple(made)


def asked_schema(format: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema that a request asks for, None for free text; raises RequestRefused when it has none to give."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return format.schema_ or {"type": "object"}
    if format.json_schema is None:
        raise RequestRefused(
            "response_format json_schema without a schema",
            param="response_format",
            expected='{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}',
        )
    return format.json_schema.schema_


def usage_block(answers: Sequence[Completed]) -> dict[str, Any]:
    """OpenAI's usage, which counts the prompt of several answers once, and all that was measured under `metier`."""
    usages = [done.usage for done in answers]
    prompt, output = usages[0], sum(usage.output_tokens for usage in usages)
    measured = {name: sum(getattr(usage, name) for usage in usages) for name in Usage.model_fields}
    return {
        "prompt_tokens": prompt.prompt_tokens,
        "completion_tokens": output,
        "total_tokens": prompt.prompt_tokens + output,
        "prompt_tokens_details": {"cached_tokens": prompt.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.thinking_tokens for usage in usages)},
        "metier": measured,
    }


def completion(id: str, model: str, answers: Sequence[Completed]) -> dict[str, Any]:
    """A whole completion."""
    return {
        "id": id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(index, done) for index, done in enumerate(answers)],
        "usage": usage_block(answers),
        "metier": answers[0].origin,
    }


def _choice(index: int, done: Completed) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None if done.calls else done.text, "refusal": None}
    if done.calls:
        message["tool_calls"] = list(done.calls)
    if done.thinking:
        message["reasoning_content"] = done.thinking
    logprobs = logprobs_block(done.logprobs)
    return {"index": index, "message": message, "finish_reason": done.finish_reason, "logprobs": logprobs}


def chunk(
    id: str,
    model: str,
    created: int,
    delta: dict[str, Any] | None,
    finish_reason: str | None = None,
    *,
    index: int = 0,
    logprobs: Sequence[WrittenToken] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A piece of a streamed choice; `delta=None` has no choice, as the piece with the usage."""
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs_block(logprobs)}
    return {
        "id": id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [] if delta is None else [choice],
        **more,
    }


def text_of(content: str | list[TextPart]) -> str:
    """A content's text, of all its pieces."""
    return content if isinstance(content, str) else "".join(part.text or part.refusal for part in content)


def _text(message: ChatMessage) -> str:
    content = message.content if message.content is not None else message.refusal
    if content is None:
        raise RequestRefused(
            f"a message of {message.role!r} without content", param="messages", expected="text, or tool_calls"
        )
    return text_of(content)
