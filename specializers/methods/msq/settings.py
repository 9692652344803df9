"""Settings of MSQ, checked before anything is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from ...training.loop import TrainingSettings

__all__ = ["MsqSettings"]


class MsqSettings(TrainingSettings):
    """Settings of MSQ: mixed bit widths, found while the model is tuned.

    >>> MsqSettings(target_bits=4.5, min_bits=3).start_bits
    8
    """

    method: Literal["msq"] = "msq"

    start_bits: int = Field(default=8, ge=2, le=8)
    """Width that every linear layer starts at, in bits."""

    min_bits: int = Field(default=3, ge=2, le=8)
    """Width that no layer goes below, in bits."""

    finish_steps: int = Field(default=50, ge=0)
    """Last steps, trained at fixed widths."""

    drop_every_steps: int = Field(default=25, ge=1)
    """Steps between two rounds in which bits are dropped."""

    nonzero_below: float = Field(default=0.25, ge=0.0, le=1.0)
    """A unit may lose one or two bits when less than this share of its lowest bits are not zero. The less sensitive go
    first."""

    on_missed: Literal["stop", "drop"] = "stop"
    """When the mean width is still above `target_bits` at the last round: `stop` with an error, or `drop` what hurts
    least anyway."""

    allocation: Literal["search", "uniform", "layers"] = "search"
    """`search` is MSQ. The others are controls that are trained alike: `uniform` (all at `target_bits`) and `layers`
    (whole blocks at `start_bits` or `min_bits`, by how much a block changes its input)."""

    target_bits: float = Field(ge=2.0, le=8.0)
    """Mean width of the linear layers of all blocks, in bits, signs included."""

    penalty: float = Field(default=1.0, ge=0.0)
    """Pull on the lowest bits, as a multiple of a matrix's mean (root mean square) task gradient."""

    curvature: Literal["fisher", "hessian"] = "fisher"
    """How sensitivity is measured: `fisher` is never negative and costs first derivatives; `hessian`, the published
    form, may be negative."""

    trace_probes: int = Field(default=2, ge=1)
    """Hutchinson probes of `curvature: hessian`."""

    trace_rows: int = Field(default=16, ge=1)
    """Rows that sensitivity is measured on."""

    group_size: int | None = Field(default=None, ge=1)
    """Inputs of an output channel that share a scale. None is all of them."""

    clip: float = Field(default=1.0, gt=0.0, le=1.0)
    """A scale is the largest magnitude of its weights times this. Scales are frozen."""

    learning_rate: float = Field(default=1e-4, gt=0.0)
    """Highest learning rate: lower than an adapter's, since all weights are trained."""

    batch_rows: int = Field(default=8, ge=1)
    """Rows of one step."""

    @field_validator("target_bits")
    @classmethod
    def _within_reach(cls, target: float, info: ValidationInfo) -> float:
        given = info.data
        if not {"start_bits", "min_bits", "steps"} <= given.keys():
            return target
        start, low, steps = given["start_bits"], given["min_bits"], given["steps"]
        if not low <= target <= start:
            raise ValueError(f"an average from min_bits={low} to start_bits={start}")
        allocation = given.get("allocation")
        if allocation == "uniform" and target != int(target):
            raise ValueError("a whole number of bits, since allocation is uniform")
        if allocation != "search" or given.get("on_missed") != "stop" or target == start:
            return target
        rounds = max(0, steps - given.get("finish_steps", 0)) // given.get("drop_every_steps", 1)
        if start - 2 * rounds > target:
            raise ValueError(
                f"at least {start - 2 * rounds}, since {rounds} rounds fit into the steps and each drops at most 2 bits"
            )
        return target

    @field_validator("penalty")
    @classmethod
    def _drops_something(cls, penalty: float, info: ValidationInfo) -> float:
        given = info.data
        if penalty == 0 and given.get("allocation") == "search" and given.get("on_missed") == "stop":
            if given.get("target_bits", 0) < given.get("start_bits", 0):
                raise ValueError("above 0: without a penalty no low bit is cleared, and the target is never reached")
        return penalty
