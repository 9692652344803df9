"""A chat completion of a server as the reply to an ask."""

from __future__ import annotations

import math
from typing import Any

from ...agents.messages import Ask, Reply, Usage
from ...agents.sampling import TokenChance, WrittenToken

__all__ = ["completed", "text_of"]

MAX_COUNT = 2**63 - 1
"""What the run store can hold."""


def completed(ask: Ask, data: dict[str, Any], url: str) -> Reply:
    """The reply that it is; raises KeyError, TypeError, ValueError or AttributeError for what is no completion."""
    (choice,) = data["choices"]
    message = choice["message"]
    origin = data.get("metier") or {}
    return Reply(
        text=text_of(message.get("content")),
        thinking=text_of(message.get("reasoning_content") or message.get("reasoning")),
        profile=origin.get("profile"),
        finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
        logprobs=None if ask.sampling.logprobs is None else _written(choice.get("logprobs")),
        usage=_usage(data.get("usage") or {}),
        variant=ask.variant,
        engine=f"{url} {origin.get('engine', '')}".strip(),
    )


def _written(said: dict[str, Any] | None) -> tuple[WrittenToken, ...] | None:
    """The tokens of an answer with their log-probabilities; None where the server reports none."""
    if said is None or said.get("content") is None:
        return None
    return tuple(
        WrittenToken(
            token=text_of(one["token"]),
            logprob=one["logprob"],
            top=tuple(
                TokenChance(token=text_of(each["token"]), logprob=each["logprob"])
                for each in one.get("top_logprobs") or ()
            ),
        )
        for one in said["content"]
    )


def text_of(said: Any) -> str:
    """Text, "" where nothing is said; raises TypeError for anything else."""
    if said is not None and not isinstance(said, str):
        raise TypeError(f"{type(said).__name__} where text should be")
    return said or ""


def _usage(said: dict[str, Any]) -> Usage:
    """What the server says an ask has cost; one of ours says all, others tokens."""
    if "metier" in said:
        usage = Usage.model_validate(said["metier"])
    else:
        thinking = (said.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
        usage = Usage(
            prompt_tokens=said.get("prompt_tokens") or 0,
            cached_tokens=(said.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            thinking_tokens=thinking,
            answer_tokens=(said.get("completion_tokens") or 0) - thinking,
        )
    for name, value in usage.model_dump().items():
        if (
            isinstance(value, int)
            and not 0 <= value <= MAX_COUNT
            or isinstance(value, float)
            and not math.isfinite(value)
        ):
            raise ValueError(f"{name}={value}")
    return usage
