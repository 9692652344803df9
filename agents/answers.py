"""From a model's text to a typed answer, and the one correction ask for a reply that does not fit."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from .errors import AnswerError
from .messages import Message
from .roles import type_name

__all__ = ["answer_schema", "correction_messages", "parse_answer", "split_thinking"]

_SHOWN_CHARACTERS = 200
_OBJECT_BEGINS = re.compile(r'\{\s*["}]')
_OBJECT_OR_CUT_BEGINS = re.compile(r'\{\s*(?:["}]|\Z)')
_BARE_NUMBER = re.compile(r"\s*-?[\d.eE+-]+")
# A string that is not closed runs to the end of the text: braces after it are part of it.
_BRACE_OR_STRING = re.compile(r'[{}]|"(?:[^"\\]|\\(?:.|\Z))*+(?:"|\Z)', re.DOTALL)


def answer_schema(gives: Any) -> dict[str, Any] | None:
    """JSON schema of a role's answer type, None for free text."""
    return None if gives is str else gives.model_json_schema()


def parse_answer(text: str, gives: Any, *, cut_off: bool = False) -> Any:
    """Turn a reply's text into the type a role gives.

    Free text is returned stripped. JSON may be surrounded by other text or a code fence: the first complete object
    counts, and no object inside one that is cut off or malformed. Of a text that was `cut_off` by its limit of tokens
    an object counts only when no other is begun behind it. Takes time linear in the text.
    Raises: AnswerError that quotes the text and says what did not fit.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AnswerError(
            f"reply {_shorten(text)!r} holds half of a surrogate pair at character {error.start}",
            expected="text that can be written as UTF-8",
            remedy="Look at the server's log: its tokenizer or its JSON is at fault.",
        ) from error
    if gives is str:
        return text.strip()
    model: type[BaseModel] = gives
    if cut_off and _ends_within(text):
        raise _misfit(text, model, "it was cut off by max_tokens")
    try:
        return model.model_validate_json(text)
    except ValidationError:
        found = _first_object(text)
    if found is None:
        raise _misfit(text, model, "it holds no complete JSON object")
    try:
        return model.model_validate_json(found)
    except ValidationError as error:
        reasons = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)[:3])
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


def _first_object(text: str) -> str | None:
    """The first complete JSON object of a text, as text; None when it holds none, or one begins and never ends.

    What begins like an object (a brace, then a name or a closing brace) and is none hides all that is inside it: an
    object inside an answer is not the answer.
    """
    at = 0
    while begins := _OBJECT_BEGINS.search(text, at):
        end = _end_of_object(text, begins.start())
        if end is None:
            return None
        found = text[begins.start() : end]
        try:
            from_json(found)
        except ValueError:
            at = end
        else:
            return found
    return None


def _ends_within(text: str) -> bool:
    """Whether a text ends inside an object, or in a number of which more digits may have come."""
    at = 0
    while begins := _OBJECT_OR_CUT_BEGINS.search(text, at):
        end = _end_of_object(text, begins.start())
        if end is None:
            return True
        at = end
    return _BARE_NUMBER.fullmatch(text) is not None


def _end_of_object(text: str, start: int) -> int | None:
    """Where the braces that open at `start` are closed, those in strings not counted; None when they never are."""
    depth = 0
    for token in _BRACE_OR_STRING.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return None


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
