"""Profiles: the measured quality and cost of each variant at each part of a workflow, one JSON line each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from ...agents.errors import ProfileError
from ...agents.frozen_model import FrozenModel
from ...agents.step_paths import PathStep
from ..assignment import BASE
from ..space import Candidate, Part, RoundClass
from .intervals import bootstrap_interval, mean
from .journal import Journal
from .outcomes import AskCost, Outcome

__all__ = ["Footprint", "Profile", "TokenCost", "fit_token_cost", "make_profile", "read_profiles", "write_profiles"]

FIT_ASKS = 12
"""Fewer asks than this say too little about the cost of a token."""


class Footprint(FrozenModel):
    """The memory that a variant needs to be served."""

    checkpoint: str = BASE
    """Its checkpoint: `base`, or a content id."""

    checkpoint_mib: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Memory of the checkpoint, in MiB."""

    adapter: str = ""
    """Content id of the variant whose adapter it uses, "" for none."""

    adapter_rank: int = Field(default=0, ge=0)
    """Rows of a slot that the adapter needs."""

    slot_mib: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Memory of all slots of an engine once any adapter is served on the checkpoint, in MiB."""

    memory_known: bool = True
    """False for a variant on a server elsewhere, whose memory is not known; the amounts then mean nothing."""

    @property
    def prefix_key(self) -> str:
        """Asks with the same key find each other's prompt in the prefix cache."""
        return f"{self.checkpoint}/{self.adapter}"


class TokenCost(FrozenModel):
    """Cost of a prompt token that is not in the prefix cache; of a generated token and a step too, where steps were
    measured."""

    prefill_cpu_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """CPU-seconds of a prompt token."""

    prefill_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds by which a prompt token makes the ask longer."""

    decode_cpu_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """CPU-seconds of a generated token."""

    step_cpu_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """CPU-seconds of an engine step, whatever is in it. 0 where steps were not measured."""


class Profile(FrozenModel):
    """One candidate at one part, the other parts played by the incumbent. Amounts are means over `n` tasks.

    Raises: ProfileError (on reading) when a number is NaN.
    """

    key: str
    """Key of the profile: the runs it was made from, part, candidate and incumbent."""

    workflow: str
    """Fingerprint of the workflow."""

    tasks: str
    """Key of the tasks."""

    incumbent: str
    """The incumbent as text."""

    role: str
    """Role of the part."""

    rounds: RoundClass = "all"
    """Rounds of the part."""

    variant: str = BASE
    """The candidate's variant."""

    variant_id: str = BASE
    """Its content id."""

    thinking_tokens: int | None = None
    """Most tokens that the candidate thinks. None leaves that to the role."""

    n: int = Field(ge=1)
    """Tasks measured."""

    quality: float = Field(ge=0, le=1)
    """Mean score of the workflow."""

    quality_interval: tuple[float, float]
    """Its bootstrap interval."""

    gain: float = 0.0
    """Mean difference of the score to the incumbent on the same tasks."""

    gain_interval: tuple[float, float] = (0.0, 0.0)
    """Its bootstrap interval."""

    role_quality: float | None = None
    """Mean score by the role's own verifier. None where there is none."""

    asks: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Asks of this part, a task."""

    prompt_tokens: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Prompt tokens of this part, a task."""

    cached_tokens: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Those that came from the prefix cache."""

    thinking_used: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Thinking tokens of this part, a task."""

    answer_tokens: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Answer tokens of this part, a task."""

    cpu_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """CPU-seconds of this part, a task."""

    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds of prefill and decode of this part, one ask after the other, a task."""

    swaps: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Adapter loads of this part, a task."""

    run_cpu_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """CPU-seconds of the whole run, a task."""

    elsewhere_cpu_s: float = Field(default=0.0, allow_inf_nan=False)
    """CPU-seconds that the other parts use more than with the incumbent: a bad plan costs rounds."""

    elsewhere_seconds: float = Field(default=0.0, allow_inf_nan=False)
    """Seconds that the other parts take more than with the incumbent."""

    elsewhere_tokens: float = Field(default=0.0, allow_inf_nan=False)
    """Tokens that the other parts use more than with the incumbent."""

    shared_tokens: dict[str, float] = {}
    """Earlier part → prompt tokens that the prefix cache saves where one variant plays both. "" is what every run
    shares."""

    token_cost: TokenCost = TokenCost()
    """Cost of tokens and steps on its checkpoint."""

    footprint: Footprint = Footprint()
    """Memory of the candidate's variant."""

    dropped: str = ""
    """Why the probe stopped measuring it early, empty where it did not."""

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, given: object) -> object:
        if isinstance(given, dict):
            for name, value in given.items():
                if isinstance(value, float) and math.isnan(value):
                    raise ProfileError(
                        f"the profile of {given.get('role')!r} on {given.get('variant')!r} has {name}=NaN",
                        expected="a number",
                        remedy="Correct the scorer and probe again.",
                    )
        return given

    @property
    def part(self) -> Part:
        """The part that was measured."""
        return Part(self.role, self.rounds)

    @property
    def candidate(self) -> Candidate:
        """The candidate that played it."""
        return Candidate(self.variant, self.thinking_tokens)

    @property
    def written_tokens(self) -> float:
        """Generated tokens of this part, a task."""
        return self.thinking_used + self.answer_tokens

    @property
    def tokens(self) -> float:
        """Prompt and generated tokens of this part, a task."""
        return self.prompt_tokens + self.written_tokens


def make_profile(
    part: Part,
    candidate: Candidate,
    outcomes: Sequence[Outcome],
    incumbent: Sequence[Outcome],
    *,
    parts: Sequence[Part],
    key: str,
    workflow: str,
    tasks: str,
    incumbent_name: str,
    variant_id: str,
    token_cost: TokenCost,
    footprint: Footprint,
    dropped: str = "",
    confidence: float = 0.95,
) -> Profile:
    """A profile from the outcomes of one candidate and of the incumbent, on the same tasks in the same order."""
    scores = [outcome.score for outcome in outcomes]
    gains = [a.score - b.score for a, b in zip(outcomes, incumbent, strict=True)]
    n = len(scores)
    own = [ask for outcome in outcomes for ask in outcome.asks if part.covers(ask.role, ask.round)]
    verified = [outcome.role_scores[part.role] for outcome in outcomes if part.role in outcome.role_scores]
    others, were = _others(part, outcomes), _others(part, incumbent)
    return Profile(
        key=key,
        workflow=workflow,
        tasks=tasks,
        incumbent=incumbent_name,
        role=part.role,
        rounds=part.rounds,
        variant=candidate.variant,
        variant_id=variant_id,
        thinking_tokens=candidate.thinking_tokens,
        n=n,
        quality=mean(scores),
        quality_interval=bootstrap_interval(scores, confidence=confidence),
        gain=mean(gains),
        gain_interval=bootstrap_interval(gains, confidence=confidence),
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
        shared_tokens=_shared(own, parts, n),
        token_cost=token_cost,
        footprint=footprint,
        dropped=dropped,
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


def write_profiles(path: Path, rows: Sequence[Profile]) -> int:
    """Append the profiles that the file does not have yet, and return how many those were."""
    with Journal(path, Profile) as journal:
        new = [row for row in rows if journal.get(row.key) is None]
        for row in new:
            journal.add(row)
    return len(new)


def read_profiles(path: Path) -> list[Profile]:
    """The profiles of a file's last probe: those of its last line's workflow, tasks and incumbent.

    Raises: ProfileError when there are none, or a line is no profile.
    """
    if not path.is_file():
        raise ProfileError(f"no profiles {path}", expected="a file that `metier probe` wrote")
    rows: dict[str, Profile] = {}
    with Journal(path, Profile) as journal:
        rows = dict(journal.items())
    if not rows:
        raise ProfileError(f"{path} has no profiles", expected="a file that `metier probe` wrote")
    last = list(rows.values())[-1]
    return [
        row
        for row in rows.values()
        if (row.workflow, row.tasks, row.incumbent) == (last.workflow, last.tasks, last.incumbent)
    ]


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
