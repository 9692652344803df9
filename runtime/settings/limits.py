"""What a run may use before it is stopped."""

from __future__ import annotations

from pydantic import Field

from ...agents.frozen_model import FrozenModel

__all__ = ["RunLimits"]


class RunLimits(FrozenModel):
    """What one run may use before it is stopped with LimitError.

    >>> RunLimits(max_tokens=20_000).max_seconds_s is None
    True
    """

    max_tokens: int | None = Field(default=None, ge=1)
    """Prompt and generated tokens of all its asks. None is no limit."""

    max_seconds_s: float | None = Field(default=None, gt=0)
    """Wall time in seconds; a resumed run starts at 0 again. None is no limit."""

    def over(self, others: RunLimits) -> RunLimits:
        """These limits, and those of `others` where there are none here.

        >>> RunLimits(max_tokens=5).over(RunLimits(max_tokens=9, max_seconds_s=60.0))
        RunLimits(max_tokens=5, max_seconds_s=60.0)
        """
        return others.model_copy(update=self.model_dump(exclude_none=True))
