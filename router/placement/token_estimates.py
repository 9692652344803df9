"""Estimates from earlier replies: how many tokens a prompt has, and how many its answer will have."""

from __future__ import annotations

from ...agents.messages import Ask, Usage
from .placement import PlacedAsk

__all__ = ["TokenEstimates"]

CHARACTERS_PER_TOKEN = 4.0
"""Characters a token of English text, used before the first reply."""
ANSWER_TOKENS = 64
"""Tokens of an answer, used before the role's first reply (or `max_tokens` where that is less)."""
ROLES_KEPT = 10_000
"""Most roles whose answer lengths are kept; more only come from clients that invent role names."""


class TokenEstimates:
    """Means over all replies: characters of a prompt for each token, and tokens generated for each role."""

    def __init__(self) -> None:
        self._characters = 0
        self._tokens = 0
        self._answers: dict[str, tuple[int, int]] = {}

    def placed(self, ask: Ask, adapter: str | None) -> PlacedAsk:
        """The ask as placement sees it; prompts of one run share their beginning as far as the adapter is the same."""
        per_token = self._characters / self._tokens if self._tokens else CHARACTERS_PER_TOKEN
        tokens, asks = self._answers.get(ask.role, (min(ask.max_tokens, ANSWER_TOKENS), 1))
        return PlacedAsk(
            adapter,
            f"{ask.run_id}/{adapter or ''}",
            prompt_tokens=round(_characters(ask) / per_token),
            answer_tokens=round(tokens / asks),
            remaining_s=ask.remaining_s,
        )

    def note(self, ask: Ask, usage: Usage) -> None:
        """An ask was answered."""
        if usage.prompt_tokens:
            self._characters += _characters(ask)
            self._tokens += usage.prompt_tokens
        if len(self._answers) >= ROLES_KEPT:
            self._answers.clear()
        tokens, asks = self._answers.get(ask.role, (0, 0))
        self._answers[ask.role] = (tokens + usage.output_tokens, asks + 1)


def _characters(ask: Ask) -> int:
    return sum(len(message.content) for message in ask.messages)
