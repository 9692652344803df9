"""Turns: what was asked and replied before, shown to a role as messages; and which of them fall out of a bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from .frozen_model import FrozenModel
from .messages import Message

__all__ = ["Turn", "holds_turns", "kept_turns", "turn_messages", "turns_field", "turns_in"]

TOKEN_BYTES = 3
"""Bytes of UTF-8 that count as a token."""


class Turn(FrozenModel):
    """One turn that is over: what was asked, and the reply.

    A role that takes `list[Turn]`, or a model with a field of that type, is shown them as messages before its own
    prompt.

    >>> Turn(asked="What is 2 + 2?", replied="4").tokens
    6
    """

    asked: str
    """The text of the user's message."""

    replied: str
    """The text of the assistant's."""

    @property
    def tokens(self) -> int:
        """Its length in tokens, counted as a token for every three bytes of UTF-8.

        That is more than the tokens of English, and about those of Chinese. No model's tokenizer is needed, so the
        same turns are kept wherever a conversation goes on.
        """
        return sum(-(-len(text.encode("utf-8", "surrogatepass")) // TOKEN_BYTES) for text in (self.asked, self.replied))


def kept_turns(turns: Iterable[Turn], max_tokens: int) -> tuple[Turn, ...]:
    """The turns that are still shown, when at most `max_tokens` may be.

    Turns are added one by one. Where they become more than that, the oldest fall out until half remains: prompts then
    share their beginning until that is used up again, rather than lose it with every turn. The newest stays in any
    case, unless it is too long by itself.

    >>> turns = [Turn(asked="abc" * n, replied="") for n in (30, 30, 30, 20)]
    >>> [turn.tokens for turn in kept_turns(turns, 80)]
    [30, 20]
    """
    kept: list[Turn] = []
    total = 0
    for turn in turns:
        kept.append(turn)
        total += turn.tokens
        if total <= max_tokens:
            continue
        while kept and total > (max_tokens // 2 if len(kept) > 1 else max_tokens):
            total -= kept.pop(0).tokens
    return tuple(kept)


_TURNS = list[Turn]
_MODELS_KEPT = 1000


def holds_turns(kind: Any) -> bool:
    """Whether a declared type is turns, which are shown as messages and not as a part of the prompt."""
    return bool(kind == _TURNS)


def turns_field(kind: Any) -> str | None:
    """The field of a model that holds earlier turns, None where it has none, and for other types."""
    return _field_of(kind) if isinstance(kind, type) and issubclass(kind, BaseModel) else None


@lru_cache(_MODELS_KEPT)
def _field_of(model: type[BaseModel]) -> str | None:
    return next((name for name, field in model.model_fields.items() if holds_turns(field.annotation)), None)


def turns_in(inputs: Mapping[str, Any]) -> list[Turn]:
    """The turns among a role's inputs: of the first that is such a list, or a model that holds one."""
    for value in inputs.values():
        if isinstance(value, list) and value and all(isinstance(one, Turn) for one in value):
            return value
        field = turns_field(type(value))
        if field is not None and getattr(value, field):
            return list(getattr(value, field))
    return []


def turn_messages(turns: Iterable[Turn]) -> tuple[Message, ...]:
    """Turns as messages of user and assistant."""
    return tuple(
        message
        for turn in turns
        for message in (Message(role="user", content=turn.asked), Message(role="assistant", content=turn.replied))
    )
