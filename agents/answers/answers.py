"""From a model's text to a typed answer, and the one correction ask for a reply that does not fit."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from ..errors import AnswerError
from ..messages import Message
from ..recorded_values import type_adapter
from ..roles import type_name
from .answer_schema import described_schema, json_kinds
from .answer_shape import answer_shape

__all__ = ["correction_messages", "parse_answer", "split_thinking"]

_SHOWN_CHARACTERS = 200
_OBJECT_BEGINS = re.compile(r'\{\s*["}]')
_OBJECT_OR_CUT_BEGINS = re.compile(r'\{\s*(?:["}]|\Z)')
_BARE_NUMBER = re.compile(r"\s*-?[\d.eE+-]+")
# A string that is not closed runs to the end of the text: braces after it are part of it.
_DEPTH = {"{": 1, "[": 1, "}": -1, "]": -1}
_BRACE_OR_STRING = re.compile(r'[{}]|"(?:[^"\\]|\\(?:.|\Z))*+(?:"|\Z)', re.DOTALL)
_BRACKET_OR_STRING = re.compile(r'[{}\[\]]|"(?:[^"\\]|\\(?:.|\Z))*+(?:"|\Z)', re.DOTALL)
_LIST_OR_OBJECT_BEGINS = re.compile(r'\{\s*["}]|\[\s*(?:["{\[\]\d-]|true|false|null)')
_CONTROL = re.compile(r"[\x00-\x1f]")
_CODE_FENCE = re.compile(r"\A\s*```\w*\n|\n```\s*\Z")


def parse_answer(text: str, gives: Any, *, cut_off: bool = False) -> Any:
    """Turn a reply's text into the type a role gives.

    Free text is returned stripped. JSON may be surrounded by other text or a code fence: the first complete object
    counts (or list, where the type is one), and no object inside one that is cut off or malformed. Of a text that was
    `cut_off` by its limit of tokens an object counts only when no other is begun behind it. A type that is text, such
    as an enum, may be written without its quotes. Takes time linear in the text.
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
    if cut_off and _ends_within(text):
        raise _misfit(text, gives, "it was cut off by max_tokens")
    read = type_adapter(gives).validate_json
    try:
        return read(text)
    except ValidationError:
        found = _value_within(_escape_controls(text), json_kinds(gives), cut_off)
    if found is None:
        raise _misfit(text, gives, f"it holds no complete JSON {' or '.join(_called(json_kinds(gives)))}")
    try:
        return read(found)
    except ValidationError as error:
        reasons = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)[:3])
        raise _misfit(text, gives, "; ".join(reasons)) from error


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


def _misfit(text: str, gives: Any, reason: str) -> AnswerError:
    shape = answer_shape(gives)
    fields = ", ".join(described_schema(gives).get("properties", ()))
    return AnswerError(
        f"reply {_shorten(text)!r} is no {type_name(gives)}: {reason}",
        expected=f"JSON with the fields {fields}" if shape.plain else f"JSON of this shape: {shape.text}",
        remedy="Give the role more max_tokens, clearer instructions, or a variant tuned for it.",
    )


def _escape_controls(text: str) -> str:
    """A text whose strings hold no bare control characters, such as the line ends that models write in them.

    JSON wants them escaped; the grammars of strings with a bounded length do not.
    """
    if not _CONTROL.search(text):
        return text
    return _BRACE_OR_STRING.sub(lambda token: _CONTROL.sub(lambda c: f"\\u{ord(c[0]):04x}", token[0]), text)


def _called(kinds: frozenset[str]) -> list[str]:
    return sorted(kinds & {"object", "array"}) or ["value"]


def _value_within(text: str, kinds: frozenset[str], cut_off: bool) -> str | None:
    """The JSON value of one of these kinds that a text holds, as text; None when it holds none that is complete."""
    if kinds & {"object", "array"}:
        found = _first_object(text, lists="array" in kinds)
        if found is not None or _OBJECT_OR_CUT_BEGINS.search(text) or not kinds - {"object", "array"}:
            return found
    bare = _CODE_FENCE.sub("", text).strip()
    try:
        from_json(bare)
    except ValueError:
        plain = "string" in kinds and not cut_off and bare and bare[0] not in '"{['
        return json.dumps(bare) if plain else None
    return bare


def _first_object(text: str, *, lists: bool) -> str | None:
    """The first complete JSON object of a text, as text; None when it holds none, or one begins and never ends.
    With `lists` a list may come first.

    What begins like an object (a brace, then a name or a closing brace) and is none hides all that is inside it: an
    object inside an answer is not the answer.
    """
    at = 0
    begin = _LIST_OR_OBJECT_BEGINS if lists else _OBJECT_BEGINS
    while begins := begin.search(text, at):
        end = _end_of_object(text, begins.start(), _BRACKET_OR_STRING if lists else _BRACE_OR_STRING)
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
        end = _end_of_object(text, begins.start(), _BRACE_OR_STRING)
        if end is None:
            return True
        at = end
    return _BARE_NUMBER.fullmatch(text) is not None


def _end_of_object(text: str, start: int, tokens: re.Pattern[str]) -> int | None:
    """Where the braces that open at `start` are closed, those in strings not counted; None when they never are."""
    depth = 0
    for token in tokens.finditer(text, start):
        depth += _DEPTH.get(token[0], 0)
        if depth == 0:
            return token.end()
    return None


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
