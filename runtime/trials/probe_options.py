"""What a probe is started with, and the file that keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field

from ...agents.errors import ProfileError
from ...agents.frozen_model import FrozenModel
from ...agents.record_files import read_record
from ...router.probing.probe import ProbeSettings
from ...specializers.shelf.bundled_model import DEFAULT_BASE
from ..backends import DEFAULT_ENGINE, EngineName
from ..settings.session import Settings, load_settings

__all__ = ["OPTIONS", "ProbeOptions", "read_options"]

OPTIONS = "probe.json"
"""The file's name in a probe's folder."""


class ProbeOptions(FrozenModel):
    """What a probe was started with, kept in its folder so that `metier assign` runs the workflow in the same way."""

    workflow: str
    """`file.py` or `file.py:name` of the task graph."""
    tasks: str
    """Tasks of the file to probe on, as `split:size[:seed]`."""
    variants: tuple[str, ...]
    """Candidates beside those of the incumbent, as `name` or `name@thinking tokens`."""
    incumbent: str | None = None
    """File of the assignment to start from; None: the base plays every role."""
    split_rounds: bool = True
    """Whether a loop's first round and later ones are different parts."""
    base: str = DEFAULT_BASE
    """Base model: a bundled name, a folder or a Hugging Face id."""
    # Probes were made when folders of variants were called `also`.
    shelf: tuple[str, ...] = Field(default=(), validation_alias=AliasChoices("shelf", "also"))
    """Folders of variants beside the user's own shelf."""
    engine: EngineName = DEFAULT_ENGINE
    """Which engine answers: its name, or a server's URL."""
    concurrency: int | None = None
    """Runs at a time; None: as the settings say."""
    seed: int = 0
    """Seed of sampling."""
    settings: str | None = None
    """Settings file, None for the defaults."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Single settings over that file, by name."""
    mix_machines: bool = False
    """Whether what other machines measured is used as if it had been measured here."""
    probe: ProbeSettings = ProbeSettings()
    """How long and how exactly to probe."""

    def load_settings(self) -> Settings:
        """Settings of the sessions and engines."""
        return load_settings(Path(self.settings) if self.settings else None, self.overrides)


def read_options(folder: Path) -> ProbeOptions:
    """What the probe of a folder was started with; raises ProfileError when there was none."""
    return read_record(
        folder / OPTIONS,
        ProbeOptions,
        ProfileError,
        what="record of a probe",
        expected="a folder of `metier probe`",
        remedy="Name it with --probe.",
    )
