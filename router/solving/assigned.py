"""What assigning is told and what it returns: settings, measurements, contenders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..probing.intervals import bootstrap_interval, mean
from ..probing.outcomes import Outcome
from ..space import Candidate, Part
from .coupling import Prediction, Rejected
from .limits import Limits
from .solve import Solution, SolverSettings

__all__ = ["AssignSettings", "Assigned", "Contender", "Goal", "Measured", "measure"]


Goal = Literal["cpu_s", "cost_of_pass", "latency_s", "tokens", "memory_mib"]


class AssignSettings(BaseModel):
    """What is minimised, within which limits, and how a choice is checked.

    The check runs the choice and the incumbent on held-out tasks: the choice holds when its mean score is not below
    the incumbent's by more than `quality_loss`, and not below `limits.min_quality` where that is given. At most
    `checks` choices are tried. With `rivals` the best choice on each checkpoint alone is run too, and taken where it
    holds and costs less; also one that is predicted to miss the quality by up to `rival_shortfall`, which is what
    profiles on some fifty tasks may be off by. With `measure_baselines` the baselines are run on the same tasks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimise: Goal = "cpu_s"
    limits: Limits = Limits()
    quality_loss: float = Field(default=0.02, ge=0, le=1)
    checks: int = Field(default=8, ge=1)
    rivals: bool = True
    rival_shortfall: float = Field(default=0.1, ge=0, le=1)
    measure_baselines: bool = False
    solver: SolverSettings = SolverSettings()
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """What a choice came to on held-out tasks; `gain` is the paired difference to the incumbent, with intervals."""

    n: int
    quality: float
    quality_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]
    cpu_s: float
    seconds: float
    tokens: float

    @property
    def cost_of_pass(self) -> float:
        """CPU-seconds per solved task, failures counted."""
        return self.cpu_s / self.quality if self.quality > 0 else float("inf")


@dataclass(frozen=True)
class Contender:
    """One line of the table: a choice by name, what was expected of it and what it came to; None where unknown."""

    name: str
    choices: Mapping[Part, Candidate] | None
    prediction: Prediction | None
    measured: Measured | None = None
    note: str = ""


@dataclass(frozen=True)
class Assigned:
    """The choice, why each part got its candidate, the table with the baselines, and what was rejected and why.

    `expected` is what it will come to: its prediction, corrected by the check.
    """

    solution: Solution
    measured: Measured | None
    expected: Prediction
    reasons: dict[Part, str]
    front: list[Solution]
    table: list[Contender]
    rejected: list[Rejected]
    excluded: list[Contender]


def measure(outcomes: Sequence[Outcome], before: Sequence[Outcome]) -> Measured:
    """What runs came to, `before` being the incumbent's on the same tasks."""
    scores = [outcome.score for outcome in outcomes]
    gains = [a.score - b.score for a, b in zip(outcomes, before, strict=True)]
    asks = [ask for outcome in outcomes for ask in outcome.asks]
    n = len(outcomes)
    return Measured(
        n,
        mean(scores),
        bootstrap_interval(scores),
        mean(gains),
        bootstrap_interval(gains),
        sum(ask.cpu_s for ask in asks) / n,
        sum(ask.seconds + ask.swap_s for ask in asks) / n,
        sum(ask.prompt_tokens + ask.output_tokens for ask in asks) / n,
    )
