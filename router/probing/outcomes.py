"""The outcome of one run of a workflow under one assignment: its score, and what each ask cost."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...agents.errors import ProfileError

__all__ = ["AskCost", "Outcome"]


class AskCost(BaseModel):
    """What one ask of a run cost; `reused` where its reply came from an earlier run that asked exactly the same.

    `cpu_s` and `seconds` (prefill and decode, without queueing and swaps) are the engine's; `shared_tokens` maps
    earlier asks of the run, by `role[round]`, to the length of the common prompt prefix in tokens, which a prefix cache
    saves where the same variant answers both. Its key "" is the prefix shared with asks of other runs. `content`
    is a hash of the ask and the variant that answered it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    round: int = Field(default=1, ge=1)
    variant: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    thinking_tokens: int = 0
    answer_tokens: int = 0
    cpu_s: float = 0.0
    seconds: float = 0.0
    swaps: int = 0
    swap_s: float = 0.0
    reused: bool = False
    content: str = ""
    shared_tokens: dict[str, int] = {}

    @property
    def output_tokens(self) -> int:
        """All generated tokens, thinking included."""
        return self.thinking_tokens + self.answer_tokens


class Outcome(BaseModel):
    """How one task ended under one assignment: the workflow's score (a failed run scores 0) and what was asked.

    `role_scores` holds a role's own verifier, where the workflow has one, as the mean over its answers.
    Raises: ProfileError when a score is not a number from 0 to 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    task: str
    score: float
    asks: tuple[AskCost, ...] = ()
    role_scores: dict[str, float] = {}
    error: str = ""

    @field_validator("score")
    @classmethod
    def _is_a_score(cls, score: float) -> float:
        return check_score(score, "the workflow's score")

    @field_validator("role_scores")
    @classmethod
    def _are_scores(cls, scores: dict[str, float]) -> dict[str, float]:
        return {role: check_score(score, f"the score of role {role!r}") for role, score in scores.items()}

    @property
    def cpu_s(self) -> float:
        """CPU-seconds of the whole run."""
        return math.fsum(ask.cpu_s for ask in self.asks)


def check_score(score: float, what: str) -> float:
    """A score as it is; raises ProfileError when it is NaN or outside 0 to 1."""
    if not 0.0 <= score <= 1.0:  # also catches NaN
        raise ProfileError(f"{what} is {score}", expected="a number from 0 to 1", remedy="Correct the scorer.")
    return score
