"""What a choice must keep to, and the amounts that may be minimised."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...agents.frozen_model import FrozenModel
from .coupling import Prediction

__all__ = ["TOLERANCE", "Amount", "Limits"]


Amount = Literal["cpu_s", "latency_s", "tokens", "memory_mib", "quality"]
"""What may be minimised; quality is maximised."""


TOLERANCE = 1e-9


class Limits(FrozenModel):
    """What a choice must keep to. None is no limit.

    >>> Limits(min_quality=0.9, memory_mib=2048).given()
    {'min_quality': 0.9, 'memory_mib': 2048.0}
    """

    min_quality: float | None = Field(default=None, ge=0, le=1)
    """Least mean score of a task, 0 to 1."""

    cpu_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most CPU-seconds a task."""

    latency_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most seconds a task, its asks one after the other."""

    tokens: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most tokens a task, prompts included."""

    memory_mib: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most memory of all engines together, in MiB."""

    def given(self) -> dict[str, float]:
        """The limits there are, by name."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    def excess(self, prediction: Prediction) -> float:
        """By what share the limits are missed, added up; 0 when all are kept."""
        total = 0.0
        for name, limit in self.given().items():
            if name == "min_quality":
                total += max(limit - prediction.quality, 0.0) / max(limit, TOLERANCE)
            else:
                total += max(getattr(prediction, name) - limit, 0.0) / limit
        return total if total > TOLERANCE else 0.0
