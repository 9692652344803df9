"""The settings of assigning, and what it returns: measurements, contenders, the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ...agents.frozen_model import FrozenModel
from ..probing.intervals import bootstrap_interval, mean
from ..probing.outcomes import Outcome
from ..space import Candidate, Part
from .coupling import Prediction, Rejected
from .limits import Limits
from .solve import Solution, SolverSettings

__all__ = ["AssignSettings", "Assigned", "Contender", "Goal", "Measured", "measure"]


Goal = Literal["cpu_s", "cost_of_pass", "latency_s", "tokens", "memory_mib"]


class AssignSettings(FrozenModel):
    """What is minimised, within which limits, and how a choice is checked on held-out tasks.

    >>> from metier.router import Limits
    >>> AssignSettings(minimise="latency_s", quality_loss=0.01, limits=Limits(memory_mib=2048)).checks
    8
    """

    minimise: Goal = "cpu_s"
    """The amount to make small. `cost_of_pass` is CPU-seconds per solved task."""

    limits: Limits = Limits()
    """What the choice must keep to."""

    quality_loss: float = Field(default=0.02, ge=0, le=1)
    """How far the choice's mean score may lie below the incumbent's."""

    checks: int = Field(default=8, ge=1)
    """How many choices are run on the held-out tasks at most."""

    rivals: bool = True
    """Whether the best choice on each checkpoint alone is run too, and taken where it holds and costs less."""

    rival_shortfall: float = Field(default=0.1, ge=0, le=1)
    """Such a choice is still run when it is predicted to miss the quality by this much: profiles on some fifty tasks
    may be off by as much."""

    measure_baselines: bool = False
    """Whether the baselines are run on the same tasks."""

    solver: SolverSettings = SolverSettings()
    """How choices are searched for."""

    seed: int = 0
    """Seed of the search and of the checks."""


@dataclass(frozen=True)
class Measured:
    """A choice measured on held-out tasks; `gain` is the paired difference to the incumbent, with its interval."""

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
    """One line of the table: a choice by name, its prediction and its measurement; None where unknown."""

    name: str
    choices: Mapping[Part, Candidate] | None
    prediction: Prediction | None
    measured: Measured | None = None
    note: str = ""


@dataclass(frozen=True)
class Assigned:
    """The choice, why each part got its candidate, the table with the baselines, and what was rejected and why.

    `expected` is its prediction, corrected by the check.
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
    """Sum up outcomes; `before` are the incumbent's on the same tasks."""
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
