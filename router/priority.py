"""The order in which asks of different runs are answered: short runs first, without starving old ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..agents.frozen_model import FrozenModel

__all__ = ["PrioritySettings", "order_key_s", "priority_of"]

PRIORITY_LIMIT = 2**31 - 1
"""Largest priority we give, in milliseconds: a session of 24 days."""


class PrioritySettings(FrozenModel):
    """How the asks of concurrent runs are ordered when the engine cannot take all of them at once.

    >>> PrioritySettings(order="first_come").ageing_s
    60.0
    """

    order: Literal["shortest_first", "first_come"] = "shortest_first"
    """`shortest_first`: by the seconds a run still needs and, with less weight, those it has had. `first_come`: as they
    come."""

    ask_s: float = Field(default=1.0, gt=0)
    """Seconds that an ask of a role takes where the assignment says no `expected_s` for it."""

    attained_weight: float = Field(default=0.25, ge=0)
    """Weight of a second that a run has already had, against one that it still needs."""

    ageing_s: float = Field(default=60.0, gt=0)
    """A run is never overtaken by one that began this many seconds after it, or later."""


def order_key_s(began_s: float, remaining_s: float, attained_s: float, settings: PrioritySettings) -> float:
    """The sort key of a run's next ask, in seconds; the smallest goes first.

    The key is the time the run began plus a handicap: remaining critical path and weighted attained service
    (shortest remaining time, Schrage 1968, with the least attained service of Autellix, arXiv 2502.13965, section 4),
    at most `ageing_s`. Since the handicap is bounded and all keys are on the same clock, a run that began `ageing_s`
    earlier always goes first, and keys need no update while asks wait.
    """
    handicap_s = remaining_s + settings.attained_weight * attained_s
    return began_s + min(handicap_s, settings.ageing_s)


def priority_of(key_s: float) -> int:
    """The key as the engine's integer priority, in milliseconds; the smallest goes first."""
    return min(round(1000 * key_s), PRIORITY_LIMIT)
