"""How an answer's tokens are drawn, beyond temperature, top_p and seed, and what is reported of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from .frozen_model import FrozenModel

__all__ = ["Sampling", "TokenChance", "WrittenToken", "until_stop"]


class Sampling(FrozenModel):
    """Sampling of one ask beyond temperature, top_p and seed, as clients of a server ask for it.

    >>> Sampling(stop=("\\n",), top_k=20).asks_for
    {'stop': ('\\n',), 'top_k': 20}
    """

    stop: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(default=(), max_length=16)
    """Texts before which the answer ends; thinking does not end there."""

    top_k: int = Field(default=0, ge=0, le=2**31 - 1)
    """Number of the likeliest tokens that are sampled from. 0 is all."""

    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Tokens less likely than this share of the likeliest one are left out."""

    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken from the logit of each token that has been written."""

    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken from the logit of a token for each time it has been written."""

    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    """Divides the logit of each token of prompt or answer."""

    logit_bias: dict[Annotated[int, Field(ge=0, le=2**31 - 1)], Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=1000
    )
    """Added to the logits of tokens, by their numbers in the served model's own tokenizer."""

    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Report each token of the answer with its log-probability and those of so many likeliest tokens at its place. None
    reports nothing."""

    @property
    def asks_for(self) -> dict[str, object]:
        """What it says that is not the default."""
        return self.model_dump(exclude_defaults=True)


class TokenChance(FrozenModel):
    """A token and its log-probability in nats, before temperature and grammar.

    >>> TokenChance(token=" cow", logprob=-0.5).logprob
    -0.5
    """

    token: str
    """Its text. A token that holds part of a character has U+FFFD in its place."""

    logprob: float = Field(allow_inf_nan=False)
    """At least -9999, which stands for impossible."""


class WrittenToken(TokenChance):
    """A token of an answer.

    >>> WrittenToken(token=" cow", logprob=-0.5, top=(TokenChance(token=" bull", logprob=-0.4),)).top[0].token
    ' bull'
    """

    top: tuple[TokenChance, ...] = ()
    """The likeliest tokens at its place, as many as were asked for."""


def until_stop(text: str, stop: Iterable[str]) -> str:
    """The text before the first of those that stop it."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]
