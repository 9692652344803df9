"""MSQ: find a bit-width for each part of the model while tuning it, by clearing lowest bits and then dropping them.

Every step computes with the rounded weights and moves the float ones (straight-through); a penalty pulls each weight
to the grid of fewer bits; when nearly all of a unit's lowest bits are zero it loses them, until the target average.
Source: MSQ: Memory-Efficient Bit Sparsification Quantization, ICCV 2025, arXiv 2507.22349 (on image models only).
Ours are: units that a language-model engine can serve, weights in float32 beside frozen embeddings, a penalty
measured in the task's own gradient, so that its strength means the same for every matrix, and the widths' export.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ....agents.errors import RecipeError
from ...checkpoints.checkpoint_files import CheckpointReader
from ...checkpoints.compressed_tensors import linear_layers, write_compressed
from ...checkpoints.quantisation_plan import Scheme, check_plan
from ...checkpoints.written_check import check_written
from ...shelf.variant import AskSpec
from ...training.batches import encode_rows
from ..method import Job, Made, Method
from ..trained import train_job
from ..tunable import check_tunable, load_tunable, save_tuned
from .bits import BitUnit, average_bits
from .quantiser import step_size, to_codes
from .settings import MsqSettings
from .tuning import MsqObjective

if TYPE_CHECKING:
    import torch

__all__ = ["METHOD", "make_msq", "served_schemes"]

INT4_GROUPS = (128, 64, 32)


def make_msq(settings: MsqSettings, job: Job) -> Made:
    """Write `job.out / "weights"`: tuned, with each unit in the narrowest format that holds its width.

    Raises: RecipeError (layers that cannot be quantised), TrainingError (target not reached, no rows, not finite,
    rows too long, or a checkpoint of another job), OSError when the disk is full.
    """
    base = load_tunable(job, settings)
    rows = encode_rows(job.rows, base.tokenizer, max_row_tokens=settings.max_row_tokens, template=job.template)
    layers = linear_layers(CheckpointReader(job.model))
    trained = _choose_trained(base.model, layers)
    objective = MsqObjective(
        base.model,
        settings,
        {name: trained[f"{name}.weight"] for name in layers},
        rows,
        seed=job.seed,
        **base.placed,
    )
    log, trained_card = train_job(job, settings, base, base.model, rows, objective=objective)
    bits = objective.bits
    schemes = served_schemes(bits, objective.units, layers, group_size=settings.group_size)
    _save(base.model, objective, schemes, job)
    served = {unit.name: _served_bits(schemes.get(unit.layers[0])) for unit in objective.units}
    card: dict[str, Any] = {
        **trained_card,
        "allocation": settings.allocation,
        "average_bits": round(average_bits(bits, objective.units), 4),
        "served_average_bits": round(average_bits(served, objective.units), 4),
        "bits": bits,
        "served_bits": served,
        "dropped_anyway": int(objective.dropped_anyway.item()),
    }
    return Made(ask=AskSpec(), card=card, log=log)


def served_schemes(
    bits: Mapping[str, int],
    units: Sequence[BitUnit],
    layers: Mapping[str, tuple[int, ...]],
    *,
    group_size: int | None,
) -> dict[str, Scheme]:
    """Layer → the narrowest scheme an engine has that holds its width exactly; layers without one stay at 16 bits.

    4 bits come in groups of inputs (a channel's scale is repeated), 8 bits with one scale per output channel only.
    """
    chosen: dict[str, Scheme] = {}
    for unit in units:
        candidates = []
        if bits[unit.name] <= 4:
            groups = INT4_GROUPS if group_size is None else (group_size,)
            candidates += [Scheme(bits=4, group_size=size) for size in groups]
        if group_size is None:
            candidates.append(Scheme(bits=8))
        own = {name: layers[name] for name in unit.layers}
        for scheme in candidates:
            try:
                check_plan(dict.fromkeys(own, scheme), own)
            except RecipeError:
                continue  # the kernel does not take these sizes: the next wider format
            chosen |= dict.fromkeys(own, scheme)
            break
    return chosen


def _choose_trained(model: Any, layers: Iterable[str]) -> dict[str, torch.Tensor]:
    """Let the matrices to quantise and the norms be trained, and nothing else; returns all of them by name."""
    wanted = {f"{name}.weight" for name in layers}
    trained: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted or (parameter.ndim == 1 and "norm" in name))
        if parameter.requires_grad:
            trained[name] = parameter
    return trained


def _save(model: Any, objective: MsqObjective, schemes: Mapping[str, Scheme], job: Job) -> None:
    """The rounded weights dense where an engine has no such width, and as integers and scales everywhere else."""
    import torch

    codes = {}
    for name in schemes:
        width = objective.width(name)
        scale = step_size(objective.scales[name], width)
        codes[name] = to_codes(objective.weights[name], objective.scales[name], width), scale
    with torch.no_grad():
        for name, values in objective.rounded():
            objective.weights[name].copy_(values)
    if not schemes:
        save_tuned(model, job)
        return
    dense = job.work_dir / "dense"
    shutil.rmtree(dense, ignore_errors=True)
    save_tuned(model, replace(job, out=dense))
    reader = CheckpointReader(dense / "weights")

    def quantised() -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
        for name, scheme in schemes.items():
            values, scale = (tensor.cpu() for tensor in codes[name])
            groups = 1 if scheme.group_size is None else values.shape[1] // scheme.group_size
            yield name, values, scale if scale.shape[1] == groups else scale.expand(-1, groups)

    write_compressed(reader, job.out / "weights", schemes, quantised())
    check_written(job.out / "weights")
    shutil.rmtree(dense, ignore_errors=True)


def _served_bits(scheme: Scheme | None) -> int:
    return 16 if scheme is None else scheme.bits


def _check(settings: MsqSettings, job: Job) -> None:
    check_tunable(job)
    layers = linear_layers(CheckpointReader(job.model))
    for name, (_, inputs) in layers.items():
        if settings.group_size is not None and inputs % settings.group_size:
            raise RecipeError(
                f"group_size={settings.group_size} does not divide the {inputs} inputs of {name}",
                expected="a divisor of every layer's inputs",
                remedy="Choose another, or leave it out for one scale per output channel.",
            )


METHOD = Method(settings=MsqSettings, make=make_msq, makes="weights", check=_check)
