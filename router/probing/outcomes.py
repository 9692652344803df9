"""The outcome of one run of a workflow under one assignment: its score, and what each ask cost."""

from __future__ import annotations

import math

from pydantic import Field, field_validator

from ...agents.errors import ProfileError
from ...agents.frozen_model import FrozenModel

__all__ = ["AskCost", "Outcome"]


class AskCost(FrozenModel):
    """What one ask of a run cost."""

    role: str
    """Role that asked."""

    round: int = Field(default=1, ge=1)
    """Round of the innermost loop, from 1."""

    variant: str
    """Variant that answered."""

    prompt_tokens: int = 0
    """Tokens of the whole prompt."""

    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""

    thinking_tokens: int = 0
    """Tokens generated before the end of thinking."""

    answer_tokens: int = 0
    """All other generated tokens."""

    cpu_s: float = 0.0
    """CPU-seconds of the engine."""

    seconds: float = 0.0
    """Seconds of prefill and decode, without queueing and swaps."""

    swaps: int = 0
    """Adapter loads charged to it."""

    swap_s: float = 0.0
    """Seconds that it waited for them."""

    reused: bool = False
    """Whether its reply came from an earlier run that asked exactly the same."""

    content: str = ""
    """Hash of the ask and the variant that answered: equal asks have equal hashes."""

    shared_tokens: dict[str, int] = {}
    """Earlier ask of the run (`role[round]`) → length of the common prompt prefix in tokens, which a prefix cache saves
    where the same variant answers both. "" is the prefix shared with asks of other runs."""

    @property
    def output_tokens(self) -> int:
        """All generated tokens, thinking included."""
        return self.thinking_tokens + self.answer_tokens


class Outcome(FrozenModel):
    """How one task ended under one assignment.

    Raises: ProfileError when a score is not a number from 0 to 1.
    """

    key: str
    """Key of the run in the journal."""

    task: str
    """Id of the task."""

    score: float
    """The workflow's score, 0 to 1. A run that failed scores 0."""

    asks: tuple[AskCost, ...] = ()
    """What each of its asks cost."""

    role_scores: dict[str, float] = {}
    """Role → mean score by the role's own verifier, where the workflow has one."""

    error: str = ""
    """Why the run failed, empty where it did not."""

    machine: str = ""
    """Key of the machine that it was measured on. Empty where that was not noted."""

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
