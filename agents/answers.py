"""From a model's text to a typed answer, and the one correction ask for a reply that does not fit."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import AnswerError
from .messages import Message
from .roles import type_name

__all__ = ["answer_schema", "correction_messages", "parse_answer", "split_thinking"]

_SHOWN_CHARACTERS = 200


def answer_schema(gives: Any) -> dict[str, Any] | None:
    """JSON schema of a role's answer type, None for free text."""
    return None if gives is str else gives.model_json_schema()


def parse_answer(text: str, gives: Any) -> Any:
    """Turn a reply's text into the type a role gives.

    Free text is returned stripped. JSON may be surrounded by other text or a code fence: the first complete
    object counts. Raises AnswerError that quotes the text and says what did not fit.
    """
    if gives is str:
        return text.strip()
    model: type[BaseModel] = gives
    try:
        return model.model_validate_json(text)
    except ValidationError:
        found = _first_object(text)
    if found is None:
        raise _misfit(text, model, "it holds no complete JSON object")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        reasons = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise _misfit(text, model, "; ".join(reasons)) from error


def split_thinking(text: str, start: str = "<think>", end: str = "</think>") -> tuple[str, str]:
    """Split a reply into (thinking, answer); an unclosed thinking part is all thinking."""
    before, opened, rest = text.partition(start)
    if not opened:
        return "", text
    thinking, closed, answer = rest.partition(end)
    return (thinking.strip(), before + answer.strip()) if closed else (rest.strip(), before)


def correction_messages(messages: tuple[Message, ...], reply: str, error: AnswerError) -> tuple[Message, ...]:
    """Messages of the one correction ask: the reply, and why it does not fit."""
    return (
        *messages,
        Message(role="assistant", content=_shorten(reply)),
        Message(role="user", content=f"That does not fit: {error.expected}. Write only that."),
    )


def _misfit(text: str, model: type[BaseModel], reason: str) -> AnswerError:
    return AnswerError(
        f"reply {_shorten(text)!r} is no {type_name(model)}: {reason}",
        expected=f"JSON with the fields {', '.join(model.model_fields)}",
        remedy="Give the role more max_tokens, clearer instructions, or a variant tuned for it.",
    )


def _first_object(text: str) -> Any | None:
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            return decoder.raw_decode(text, at)[0]
        except json.JSONDecodeError:
            at = text.find("{", at + 1)
    return None


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
