"""What a checkpoint answers, so that an engine that computes something else is noticed before it serves.

Kernels for few bits can be fed wrongly without any error: the answers are then garbage. With new weights the card
gets the likeliest first words after some prompts, with their log-probabilities; every engine started on them has to
give its first word about the same. That also tells models that are sure of no word from wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...agents.chat.chat_template import ChatTemplate, TemplateSettings
from ...agents.errors import ChatTemplateError
from ...agents.frozen_model import FrozenModel
from .opened_by_transformers import open_tokenizer

__all__ = ["PROMPTS", "KnownAnswer", "make_self_check", "read_self_check"]

PROMPTS = (
    "What is the capital of France?",
    "What is 2 + 2?",
    "Count from one to five.",
    "What colour is grass?",
    "Translate 'house' into Spanish.",
    "Name three fruits.",
    "Write one sentence about the sea.",
    "How many days does a week have?",
)
FIRST_WORDS = 16
"""Likeliest first tokens that are kept of each answer."""

_NAMELESS = ""
_PLAIN = TemplateSettings()
# Numbers of 16 bits and sums in another order come to 0.2 nats or so; weights that were read wrongly to several. A
# model that is sure of nothing has all its logits closer together, and its errors are smaller.
_MOST_DISTANCE = 0.6
_LEAST_DISTANCE = 0.05
_SHARE_OF_SPREAD = 0.25
# Cards of metier 0.1 hold the first word alone, of answers whose second word was this many nats behind.
_SURE_MARGIN = 2.0


class KnownAnswer(FrozenModel):
    """The likeliest first tokens after a prompt: text and log-probability in nats, the likeliest first.

    A token that no text stands for (a special one, a control character, or part of a letter) has the text "".

    >>> known = KnownAnswer(prompt="What is 2 + 2?", first=(("4", -0.1), ("Four", -2.5)))
    >>> round(known.distance("4", -0.3), 3), round(known.distance("5", -0.3), 3)
    (0.2, 2.2)
    """

    prompt: str
    """What was asked."""

    first: tuple[tuple[str, float], ...]
    """Likeliest first tokens after it, as (text, log-probability in nats), the likeliest first."""

    thinking_off: bool = False
    """Whether thinking is closed behind the prompt: a model that thinks would begin all its answers with one tag."""

    words_only: bool = False
    """Whether only the favourite is known, and that the others are at least 2 nats behind it. Cards that metier 0.1
    wrote say no more."""

    @property
    def limit(self) -> float:
        """How far, in nats, a right engine's answer may be from this one."""
        spread = self.first[0][1] - self.first[-1][1]
        return min(max(_SHARE_OF_SPREAD * spread, _LEAST_DISTANCE), _MOST_DISTANCE)

    def distance(self, text: str, logprob: float | None) -> float:
        """How far, in nats, an answer that begins with `text` is from this one.

        The larger of two: how much its log-probability differs, and half of what the model itself likes it less than
        its favourite, which two errors of one size, one up and one down, can turn around. A token that is not among
        those known counts as the last of them. `logprob` is None where an engine tells none.
        """
        values = [known for name, known in self.first if _named(name) == _named(text)] or [self.first[-1][1]]
        nearest = (
            values[0] if logprob is None or self.words_only else min(values, key=lambda value: abs(value - logprob))
        )
        difference = 0.0 if logprob is None or self.words_only else abs(nearest - logprob)
        return max(difference, (self.first[0][1] - nearest) / 2)


def make_self_check(weights: Path, template: TemplateSettings = _PLAIN) -> list[dict[str, Any]]:
    """What the model in `weights` begins its answers with, for the card; computed in float32, layer by layer.

    `template` says how prompts are written. Empty for a model without a chat template, which no engine asks.
    """
    from .layer_stream import LayerStream

    tokenizer = open_tokenizer(weights)
    chats = ChatTemplate(tokenizer, template)
    try:
        closed = chats.thinking.known
        thinks = False if closed else None
        rows = [chats.prompt([{"role": "user", "content": prompt}], thinks) for prompt in PROMPTS]
    except ChatTemplateError:
        return []
    known = []
    for prompt, logits in zip(PROMPTS, LayerStream(weights).logits(rows), strict=True):
        best = logits[-1].log_softmax(-1).topk(min(FIRST_WORDS, logits.shape[-1]))
        first = tuple(
            (_named(tokenizer.decode([token], skip_special_tokens=True)), round(value, 4))
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        known.append(KnownAnswer(prompt=prompt, first=first, thinking_off=closed).model_dump(mode="json"))
    return known


def read_self_check(card: Mapping[str, Any]) -> tuple[KnownAnswer, ...]:
    """The known answers on a variant's card; empty where there are none."""
    return tuple(_known(entry) for entry in card.get("self_check", ()))


def _known(entry: Mapping[str, Any]) -> KnownAnswer:
    if "begins" not in entry:
        return KnownAnswer.model_validate(entry)
    first = ((_named(entry["begins"]), 0.0), (_NAMELESS, -_SURE_MARGIN))
    return KnownAnswer(prompt=entry["prompt"], first=first, words_only=True)


def _named(text: str) -> str:
    """A token's text as it is compared: engines cut blanks differently, and hold back parts of letters."""
    stripped = text.strip()
    return stripped if stripped.isprintable() and "\ufffd" not in stripped else _NAMELESS
