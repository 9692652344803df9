"""What engines did in a stretch of runs, and what their steps cost: why one large batch is cheaper than three small.

An engine pays for every step once, however many asks are in it, so the CPU-seconds of a token depend on the batch. With
`R` runs going on at once on engines that take turns, each run is one token further after every turn. All tokens of a
task, `D`, thus take `D / R` turns a task, and every engine that is used makes a step in nearly each of them: its fixed
cost is `D / R` steps a task, whichever share of the tokens it writes (but never more steps than tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from pydantic import Field

from ...agents.frozen_model import FrozenModel
from ..probing.profile import TokenCost

__all__ = ["EngineWork", "busy_seconds_per_cpu_s", "engine_steps", "fit_engine_cost"]

FIT_STRETCHES = 8
"""Fewer stretches than this say too little about the cost of a step."""
LEAST_STEPS = 5
"""Stretches with fewer steps are left out: their measured cost is mostly the clock's resolution."""


class EngineWork(FrozenModel):
    """What the engine on one checkpoint did while some runs were made."""

    key: str
    """Key of the record in the journal."""

    checkpoint: str
    """The checkpoint: `base`, or a content id."""

    steps: int = Field(ge=0)
    """Engine steps."""

    prefill_tokens: int = Field(ge=0)
    """Prompt tokens computed."""

    decode_tokens: int = Field(ge=0)
    """Tokens generated."""

    cpu_s: float = Field(ge=0, allow_inf_nan=False)
    """CPU-seconds of the engine."""

    busy_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds in which it was stepping."""

    machine: str = ""
    """Key of the machine that it was measured on. Empty where that was not noted."""


def engine_steps(own_tokens: float, all_tokens: float, running: float) -> float:
    """Steps a task of an engine that writes `own_tokens` of a task's `all_tokens`, with so many runs at once."""
    return min(own_tokens, all_tokens / max(running, 1.0))


def busy_seconds_per_cpu_s(work: Sequence[EngineWork]) -> float | None:
    """How long steps took for each CPU-second they used: 1 on one thread, 0.5 on two that share; None if unknown.

    The median over stretches, so that a few on a busy machine do not count.
    """
    ratios = [one.busy_s / one.cpu_s for one in work if one.busy_s > 0 and one.cpu_s > 0 and one.steps >= LEAST_STEPS]
    return median(ratios) if ratios else None


def fit_engine_cost(work: Sequence[EngineWork]) -> TokenCost | None:
    """CPU-seconds of a prompt token, of a written token and of a step, none negative; None where there is too little.

    Least squares over stretches, each weighted by one over its cost, so that relative errors count and a long stretch
    does not outweigh the rest.
    """
    import numpy as np
    from scipy.optimize import nnls

    seen = [one for one in work if one.steps >= LEAST_STEPS and one.cpu_s > 0]
    if len(seen) < FIT_STRETCHES:
        return None
    x = np.array([[one.prefill_tokens, one.decode_tokens, one.steps] for one in seen], dtype=float)
    cpu_s = np.array([one.cpu_s for one in seen])
    weighted = x / cpu_s[:, None]
    if np.linalg.matrix_rank(weighted) < 3:
        return None
    (prefill, decode, step), _ = nnls(weighted, np.ones(len(seen)))
    return TokenCost(prefill_cpu_s=float(prefill), decode_cpu_s=float(decode), step_cpu_s=float(step))
