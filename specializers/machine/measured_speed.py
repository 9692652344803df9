"""What `metier doctor --measure` found: how fast this machine computes in each number type, kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from ...agents.frozen_model import FrozenModel
from ...agents.whole_files import write_whole
from ..shelf.base_model import cache_folder
from .machine import Machine, this_machine

__all__ = ["QUIET", "MeasuredSpeed", "Timing", "known_speed", "note_speed", "read_speeds"]

FILE = "measured_speed.json"
SPEEDS_KEPT = 32
QUIET = 0.2
"""Processors that others may have used while threads were compared: beside more, seconds say nothing of another day."""
AS_FAST = 1.1
"""More threads have to be faster by this factor to be worth their CPU-seconds."""


class Timing(FrozenModel):
    """One piece of work in one number type on so many threads."""

    dtype: str
    """Number type."""

    threads: int = Field(ge=1)
    """Threads that computed."""

    seconds: float = Field(gt=0, allow_inf_nan=False)
    """How long it took."""

    cpu_s: float = Field(gt=0, allow_inf_nan=False)
    """What it cost, in CPU-seconds."""


class MeasuredSpeed(FrozenModel):
    """One measurement: an engine's asks, and training steps, on one base."""

    machine: Machine
    """Where it was made."""

    base: str
    """Fingerprint of the base."""

    base_name: str
    """What people call it."""

    day: str
    """The day it was made on."""

    others: float = Field(ge=0)
    """Processors that other programs kept busy before it."""

    engine: tuple[Timing, ...] = Field(min_length=1)
    """The same asks, answered by an engine of each kind."""

    training: tuple[Timing, ...] = ()
    """The same training steps."""

    def fastest(self, timings: Sequence[Timing]) -> str:
        """The number type that costs the fewest CPU-seconds on the fewest threads.

        Seconds on several threads depend on what else runs, CPU-seconds of one hardly.
        """
        least = min(timing.threads for timing in timings)
        return min((timing for timing in timings if timing.threads == least), key=lambda timing: timing.cpu_s).dtype

    def threads_worth(self, timings: Sequence[Timing]) -> int | None:
        """How many threads of those tried are worth it; None on a machine that was busy, or where one was tried."""
        if not timings or self.others > QUIET:
            return None
        fastest = self.fastest(timings)
        of_it = [timing for timing in timings if timing.dtype == fastest]
        best_s = min(timing.seconds for timing in of_it)
        return min(t.threads for t in of_it if t.seconds <= AS_FAST * best_s) if len(of_it) > 1 else None

    def reason(self, timings: Sequence[Timing]) -> str:
        """What the choice rests on, in words."""
        least = min(timing.threads for timing in timings)
        each = ", ".join(f"{t.dtype} {t.cpu_s:.2f}" for t in timings if t.threads == least)
        return f"measured on {self.base_name}, {self.day}: CPU-s on {least} thread{'s' * (least > 1)}: {each}"


def known_speed(base: str | None = None) -> MeasuredSpeed | None:
    """The newest measurement on this machine with this vLLM: of this base, else of any other; None without one."""
    here = this_machine()
    mine = [speed for speed in read_speeds() if speed.machine == here]
    return next((s for s in reversed(mine) if s.base == base), mine[-1] if mine else None)


def note_speed(speed: MeasuredSpeed) -> Path:
    """Keep a measurement, in place of an earlier one of the same machine and base; returns the file.

    Raises: OSError where the cache cannot be written.
    """
    others = [known for known in read_speeds() if (known.machine, known.base) != (speed.machine, speed.base)]
    kept = [*others, speed][-SPEEDS_KEPT:]
    file = cache_folder() / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps([one.model_dump(mode="json") for one in kept], indent=1) + "\n")
    return file


def read_speeds() -> list[MeasuredSpeed]:
    """All measurements of the cache, the newest last; none where the file is missing or of another version."""
    try:
        given = json.loads((cache_folder() / FILE).read_text(encoding="utf-8"))
        return [MeasuredSpeed.model_validate(one) for one in given]
    except (OSError, ValueError, TypeError, ValidationError):
        return []
