"""Profiles: the measured quality and cost of each variant at each part of a workflow, one JSON line each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from ...agents.errors import ProfileError
from ...agents.frozen_model import FrozenModel
from ...specializers.machine.machine import Machine
from ..assignment import BASE
from ..space import Candidate, Part, RoundClass
from .journal import Journal

__all__ = ["Footprint", "Profile", "TokenCost", "read_profiles", "write_profiles"]


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

    machine: Machine = Machine()
    """The machine that its costs were measured on. Unknown in profiles from before it was noted."""

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


def write_profiles(path: Path, rows: Sequence[Profile]) -> int:
    """Append the profiles that the file does not have yet, and return how many those were."""
    with Journal(path, Profile) as journal:
        new = [row for row in rows if journal.get(row.key) is None]
        for row in new:
            journal.add(row)
    return len(new)


def read_profiles(path: Path) -> list[Profile]:
    """The profiles of a file's last probe: those of its last line's workflow, tasks and incumbent, of each candidate at
    each part the last.

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
    of_last = {
        (row.part, row.candidate): row
        for row in rows.values()
        if (row.workflow, row.tasks, row.incumbent) == (last.workflow, last.tasks, last.incumbent)
    }
    return list(of_last.values())
