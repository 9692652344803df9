"""What a chat request says of sampling, and log-probabilities as they travel back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from ....agents.sampling import Sampling, TokenChance, WrittenToken
from .client_body import ClientBody

__all__ = ["MAX_SEED", "SampledRequest", "logprobs_block", "token_blocks"]

MAX_SEED = 2**63 - 1
SMALLEST_TOP_P = 1e-6
"""Stands for a top_p of 0: the likeliest token alone."""

Stop = Annotated[str, Field(max_length=200)]


class SampledRequest(ClientBody):
    """The part of a chat request that says how its answers are sampled."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    n: int = Field(default=1, ge=1)
    """Answers to give; each has the seed after the one before."""
    stop: Stop | list[Stop] | None = Field(default=None, max_length=16)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None
    """By numbers of tokens of the served model's own tokenizer."""
    top_k: int = Field(default=0, ge=0, le=2**31 - 1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)

    def sampling(self) -> Sampling:
        """What of it is beyond temperature, top_p and seed."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        reported = self.logprobs if self.logprobs is not None else bool(self.top_logprobs)
        return Sampling(
            stop=tuple(one for one in stop if one),
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias or {},
            logprobs=self.top_logprobs or 0 if reported else None,
        )

    def share(self) -> float | None:
        """The share of the probability mass to sample from."""
        return None if self.top_p is None else max(self.top_p, SMALLEST_TOP_P)


def logprobs_block(tokens: Sequence[WrittenToken] | None) -> dict[str, Any] | None:
    """OpenAI's log-probabilities of a choice; None where none are reported."""
    return None if tokens is None else {"content": token_blocks(tokens), "refusal": None}


def token_blocks(tokens: Sequence[WrittenToken]) -> list[dict[str, Any]]:
    """Tokens as they travel."""
    return [{**_block(one), "top_logprobs": [_block(each) for each in one.top]} for one in tokens]


def _block(one: TokenChance) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in one.token
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.token.encode()) if whole else None}
