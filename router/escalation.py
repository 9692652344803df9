"""Which level of its ladder a role is on: one up for each failure of a kind that climbs, within a limit."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..agents.frozen_model import FrozenModel
from ..agents.thinking import ThinkingProfile

__all__ = ["NO_FAILURES", "ClimbCause", "EscalationLevel", "Failures", "climb"]

ClimbCause = Literal["rejected", "unparsed", "unsure"]
"""`rejected`: the loop went into another round; `unparsed`: a try ended without a reply that parses, corrections
included; `unsure`: the answer's mean log-probability was below the role's threshold."""


class EscalationLevel(FrozenModel):
    """One level of a ladder.

    >>> EscalationLevel(variant="solver-lora", thinking=256).thinking.max_tokens
    256
    """

    variant: str | None = None
    """Variant of this level. None is the role's own."""

    thinking: ThinkingProfile | None = None
    """How long this level thinks. None is the role's own."""


class Failures(NamedTuple):
    """The failures before an ask: rounds of its loop that were not accepted, and tries of its own step.

    `rejected_by` names the steps that the loop's condition looked at, `logprob` is the last answer's mean, for reasons.
    """

    rejected: int = 0
    unparsed: int = 0
    unsure: int = 0
    rejected_by: str = ""
    logprob: float | None = None


NO_FAILURES = Failures()


def climb(failures: Failures, causes: tuple[ClimbCause, ...], max_climbs: int) -> int:
    """How many levels above the first an ask is: the failures that count, at most `max_climbs`."""
    counted: int = sum(getattr(failures, cause) for cause in causes)
    return min(counted, max_climbs)
