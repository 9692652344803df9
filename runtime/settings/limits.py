"""What a run may use before it is stopped."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["RunLimits"]


class RunLimits(BaseModel):
    """What one run may use before it is stopped with LimitError; None is no limit.

    `max_tokens` counts prompt and generated tokens of all asks; `max_seconds_s` is wall time, resumes apart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int | None = Field(default=None, ge=1)
    max_seconds_s: float | None = Field(default=None, gt=0)
