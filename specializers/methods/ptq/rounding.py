"""Rounding all layers of a checkpoint one after the other: to the nearest, or by GPTQ on calibration rows.

Both are generators of (layer, int8 values [rows, inputs], scales [rows, groups]), so one layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ....agents.errors import RecipeError
from ...checkpoints.checkpoint_files import AddedWeights, CheckpointReader
from ...checkpoints.layer_stream import LayerStream, Sequences
from ...checkpoints.quantisation_plan import Scheme, fused_with
from ...checkpoints.quantisers import dequantise, gptq, round_to_nearest
from ..calibration import calibration_rows, hooked
from ..method import Job

if TYPE_CHECKING:
    from .settings import PtqSettings

__all__ = ["Rounded", "RoundingErrors", "RoundingWork", "round_by_gptq", "round_nearest"]

Rounded = tuple[str, torch.Tensor, torch.Tensor]


@dataclass
class RoundingErrors:
    """What rounding has done to the weights so far: squares summed over layers, and the worst layer."""

    weights: float = 0.0
    changes: float = 0.0
    worst: tuple[float, str] = (0.0, "")
    layers: int = 0

    @property
    def relative(self) -> float:
        """Norm of the change over norm of the weights."""
        return float((self.changes / max(self.weights, 1e-30)) ** 0.5)

    def add(self, name: str, weight: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count one layer in."""
        size, change = float(weight.square().sum()), float((rounded - weight).square().sum())
        self.weights += size
        self.changes += change
        self.worst = max(self.worst, ((change / max(size, 1e-30)) ** 0.5, name))
        self.layers += 1


@dataclass
class RoundingWork:
    """What one job quantises: shapes and schemes of its layers, the LoRA merged before, and what rounding has cost."""

    settings: PtqSettings
    reader: CheckpointReader
    layers: dict[str, tuple[int, ...]]
    plan: dict[str, Scheme]
    merged: AddedWeights | None
    errors: RoundingErrors = field(default_factory=RoundingErrors)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Scales are stored in the type of the weights: what engines compute with."""
        return self.reader.dtype(f"{next(iter(self.plan))}.weight")


def round_nearest(work: RoundingWork) -> Iterator[Rounded]:
    """Each layer by itself, in the plan's order; no data is looked at."""
    for name, scheme in work.plan.items():
        weight = work.reader.read(f"{name}.weight").float()
        if work.merged is not None:
            weight = work.merged.add(f"{name}.weight", weight)
        _check_finite(weight, f"{name} has weights")
        values, scale = round_to_nearest(
            weight,
            bits=scheme.bits,
            group_size=scheme.group_size,
            clip_search=work.settings.clip_search,
            scale_dtype=work.scale_dtype,
        )
        work.errors.add(name, weight, dequantise(values, scale))
        yield name, values, scale


def round_by_gptq(work: RoundingWork, job: Job) -> Iterator[Rounded]:
    """Layer by layer, each on what the layers before it make of the calibration rows once they are rounded."""

    settings = work.settings
    rows = calibration_rows(settings, job)
    stream = LayerStream(job.model, work.merged)
    sequences = stream.embed([row.tokens for row in rows])
    done: list[Rounded] = []
    for number in range(stream.depth):
        done.clear()

        def quantise(layer: Any, sequences: Sequences, number: int = number) -> None:
            prefix = stream.layer_name(number)
            members = {name: m for name, m in layer.named_modules() if f"{prefix}.{name}" in work.plan}
            hessians = _hessians(stream, number, members, sequences)
            for name, module in members.items():
                done.append((f"{prefix}.{name}", *_gptq_layer(work, f"{prefix}.{name}", module, hessians[name])))

        stream.run_layer(number, sequences, prepare=quantise)
        yield from done


def _hessians(
    stream: LayerStream, number: int, members: Mapping[str, Any], sequences: Sequences
) -> dict[str, torch.Tensor]:
    """Σ x xᵀ over all tokens for each member; members with the same inputs share one."""
    first = {name: fused_with(name, members)[0] for name in members}
    sums = {name: torch.zeros(members[name].in_features, members[name].in_features) for name in set(first.values())}

    def add(total: torch.Tensor) -> Any:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            inputs = args[0].flatten(0, -2)
            total.addmm_(inputs.T, inputs)

        return hook

    hooks = [members[name].register_forward_pre_hook(add(total)) for name, total in sums.items()]
    with hooked(hooks):
        for row in range(len(sequences.states)):
            stream.forward(number, sequences, row)
    return {name: sums[first[name]] for name in members}


def _gptq_layer(work: RoundingWork, name: str, module: Any, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise one layer, and leave its module with the rounded weights for the layers after it."""
    scheme = work.plan[name]
    _check_finite(module.weight, f"{name} has weights")
    _check_finite(hessian, f"{name} gets, from the calibration rows, inputs")
    values, scale = gptq(
        module.weight,
        hessian,
        bits=scheme.bits,
        group_size=scheme.group_size,
        clip_search=work.settings.clip_search,
        scale_dtype=work.scale_dtype,
        damping=work.settings.damping,
    )
    rounded = dequantise(values, scale)
    work.errors.add(name, module.weight, rounded)
    module.weight.copy_(rounded)
    return values, scale


def _check_finite(values: torch.Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise RecipeError(
            f"{what} that are not finite",
            expected="finite numbers",
            remedy="The parent diverged or is damaged: make it again.",
        )
