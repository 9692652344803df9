"""What reports and the live page show of single runs."""

from __future__ import annotations

from pydantic import Field

from ...agents.frozen_model import FrozenModel

__all__ = ["ReportSettings"]


class ReportSettings(FrozenModel):
    """What of single runs is shown, folded, in the full report and on the live page.

    >>> ReportSettings(texts=False).most_runs
    30
    """

    texts: bool = True
    """Whether inputs, prompts, answers and expected answers are shown. Turn it off where they hold secrets, before a
    report is sent on or the page is opened to others."""

    most_runs: int = Field(default=30, ge=0)
    """Runs of a batch that the full report shows in detail, those that failed or were not solved first. 0 is none."""

    most_asks: int = Field(default=40, ge=1)
    """Asks of a run that are shown. Of more, the first."""

    text_characters: int = Field(default=2000, ge=100)
    """Characters of one prompt, answer or value that are shown. The rest is cut off."""
