"""Arms of a probe, one candidate at one part each, and the profiles that their runs come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...agents.graphs.step_paths import PathStep
from ...specializers.machine.machine import Machine
from ..assignment import BASE
from ..space import Candidate, Part
from .intervals import bootstrap_interval, mean
from .journal import record_key
from .outcomes import AskCost, Outcome
from .profile import Footprint, Profile, TokenCost

__all__ = ["Arm", "ProbedWorkflow", "ServedVariant", "fit_token_cost", "make_profile"]

FIT_ASKS = 12
"""Fewer asks than this say too little about the cost of a token."""


@dataclass
class Arm:
    """One candidate at one part, the incumbent at all others; `dropped` says why it is measured no further."""

    part: Part
    candidate: Candidate
    outcomes: list[Outcome] = field(default_factory=list)
    dropped: str = ""

    @property
    def scores(self) -> list[float]:
        """Scores of its runs, in the order of the tasks."""
        return [outcome.score for outcome in self.outcomes]


@dataclass(frozen=True)
class ProbedWorkflow:
    """What all profiles of one probe have in common."""

    workflow: str
    """Fingerprint of the workflow."""

    tasks: str
    """Key of the tasks."""

    incumbent: str
    """The incumbent as text."""

    parts: Sequence[Part]
    """All parts of the workflow."""

    confidence: float
    """Confidence of the intervals."""

    machine: Machine = Machine()
    """Where all was measured."""


@dataclass(frozen=True)
class ServedVariant:
    """The variant of an arm as it was served."""

    id: str = BASE
    """Its content id."""

    footprint: Footprint = Footprint()

    token_cost: TokenCost = TokenCost()


def make_profile(arm: Arm, incumbent: Sequence[Outcome], shared: ProbedWorkflow, served: ServedVariant) -> Profile:
    """The profile of an arm; `incumbent` are the incumbent's outcomes on the same tasks in the same order."""
    part, outcomes, scores = arm.part, arm.outcomes, arm.scores
    gains = [a.score - b.score for a, b in zip(outcomes, incumbent, strict=True)]
    n = len(scores)
    own = [ask for outcome in outcomes for ask in outcome.asks if part.covers(ask.role, ask.round)]
    verified = [outcome.role_scores[part.role] for outcome in outcomes if part.role in outcome.role_scores]
    others, were = _others(part, outcomes), _others(part, incumbent)
    runs = [outcome.key for outcome in outcomes]
    where = {"machine": shared.machine.key} if shared.machine.is_known else {}
    key = record_key(
        runs=runs, part=str(part), candidate=str(arm.candidate), incumbent=shared.incumbent, id=served.id, **where
    )
    return Profile(
        key=key,
        workflow=shared.workflow,
        tasks=shared.tasks,
        incumbent=shared.incumbent,
        role=part.role,
        rounds=part.rounds,
        variant=arm.candidate.variant,
        variant_id=served.id,
        thinking_tokens=arm.candidate.thinking_tokens,
        n=n,
        quality=mean(scores),
        quality_interval=bootstrap_interval(scores, confidence=shared.confidence),
        gain=mean(gains),
        gain_interval=bootstrap_interval(gains, confidence=shared.confidence),
        role_quality=mean(verified) if verified else None,
        asks=len(own) / n,
        prompt_tokens=sum(ask.prompt_tokens for ask in own) / n,
        cached_tokens=sum(ask.cached_tokens for ask in own) / n,
        thinking_used=sum(ask.thinking_tokens for ask in own) / n,
        answer_tokens=sum(ask.answer_tokens for ask in own) / n,
        cpu_s=sum(ask.cpu_s for ask in own) / n,
        seconds=sum(ask.seconds for ask in own) / n,
        swaps=sum(ask.swaps for ask in own) / n,
        run_cpu_s=mean([outcome.cpu_s for outcome in outcomes]),
        elsewhere_cpu_s=(sum(a.cpu_s for a in others) - sum(a.cpu_s for a in were)) / n,
        elsewhere_seconds=(sum(a.seconds for a in others) - sum(a.seconds for a in were)) / n,
        elsewhere_tokens=(sum(map(_tokens, others)) - sum(map(_tokens, were))) / n,
        shared_tokens=_shared(own, shared.parts, n),
        token_cost=served.token_cost,
        footprint=served.footprint,
        dropped=arm.dropped,
        machine=shared.machine,
    )


def fit_token_cost(asks: Sequence[AskCost]) -> TokenCost:
    """What a computed prompt token costs, by least squares over asks: cost = a · prefilled + b · generated + c.

    Zero where there are too few asks, or they say that more tokens cost less.
    """
    import numpy as np

    seen = [ask for ask in asks if not ask.reused]
    if len(seen) < FIT_ASKS:
        return TokenCost()
    x = np.array([[ask.prompt_tokens - ask.cached_tokens, ask.output_tokens, 1.0] for ask in seen])
    if np.linalg.matrix_rank(x) < 3:
        return TokenCost()
    y = np.array([[ask.cpu_s, ask.seconds] for ask in seen])
    a = np.linalg.lstsq(x, y, rcond=None)[0][0]
    return TokenCost(prefill_cpu_s=max(float(a[0]), 0.0), prefill_s=max(float(a[1]), 0.0))


def _others(part: Part, outcomes: Sequence[Outcome]) -> list[AskCost]:
    return [ask for outcome in outcomes for ask in outcome.asks if not part.covers(ask.role, ask.round)]


def _tokens(ask: AskCost) -> int:
    return ask.prompt_tokens + ask.output_tokens


def _shared(own: Sequence[AskCost], parts: Sequence[Part], n: int) -> dict[str, float]:
    """Prompt tokens a task that each earlier part has in common with this one's asks; the longest of each ask."""
    shared: dict[str, float] = {}
    for ask in own:
        longest: dict[str, int] = {}
        for earlier, tokens in ask.shared_tokens.items():
            names = [""] if not earlier else [str(part) for part in parts if part.covers(*_role_and_round(earlier))]
            for name in names:
                longest[name] = max(tokens, longest.get(name, 0))
        for name, tokens in longest.items():
            shared[name] = shared.get(name, 0.0) + tokens / n
    return shared


def _role_and_round(ask: str) -> tuple[str, int]:
    named = PathStep.parse(ask)
    return named.name, named.round or 1
