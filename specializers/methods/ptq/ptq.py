"""Post-training quantisation: weights in 8 or 4 bits without training, as a checkpoint that vLLM opens as it is.

W8A8 has 8-bit weights (a scale per output channel) and rounds activations to 8 bits per token while serving: the
format that is faster on CPUs. W4A16 has 4-bit weights in groups of inputs: the smallest file, and slower there.
Rounding is to the nearest (`rtn`), or `gptq` (Frantar et al., 2210.17323), which looks at calibration rows. Everything
is streamed layer by layer, so the memory needed is far below a whole model in float32.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....agents.errors import RecipeError
from ...checkpoints.opened_by_transformers import open_tokenizer
from ...checkpoints.quantisation_plan import check_plan
from ...shelf.variant import AskSpec
from ...training.loop import Progress
from ..method import Job, Made, Method
from .settings import PtqSettings

if TYPE_CHECKING:
    from ...checkpoints.checkpoint_files import AddedWeights
    from .rounding import Rounded, RoundingWork

__all__ = ["METHOD", "check_ptq", "make_ptq"]


def check_ptq(settings: PtqSettings, job: Job) -> None:
    """Check layers, groups, patterns and what becomes of the adapter against the job's checkpoint.

    Raises: RecipeError, for an adapter that does not fit the checkpoint AdapterError.
    """
    _prepare(settings, job)


def make_ptq(settings: PtqSettings, job: Job) -> Made:
    """Quantise the job's checkpoint into `job.out / "weights"`.

    The card has the scheme, bits per weight, bytes before and after, the relative error of the weights (over all,
    and of the worst layer), and perplexities. Raises: RecipeError, TrainingError (rows too long), OSError when the
    disk is full.
    """
    from ...checkpoints.compressed_tensors import write_compressed
    from ...checkpoints.written_check import check_written
    from .rounding import round_by_gptq, round_nearest

    work = _prepare(settings, job)
    rounded = round_nearest(work) if settings.rounding == "rtn" else round_by_gptq(work, job)
    weights = job.out / "weights"
    layers = _with_progress(rounded, work, job)
    write_compressed(work.reader, weights, work.plan, layers, scale_dtype=work.scale_dtype, merged=work.merged)
    check_written(weights)
    ask = AskSpec()
    if settings.adapter == "keep" and job.adapter is not None:
        shutil.copytree(job.adapter, job.out / "adapter")
        ask = job.ask
    before, after = (_size(folder) for folder in (job.model, weights))
    card: dict[str, Any] = {
        "scheme": settings.scheme if len(set(work.plan.values())) == 1 else "mixed",
        "rounding": settings.rounding,
        "served_average_bits": round(_average_bits(work), 4),
        "bytes": after,
        "bytes_before": before,
        "size_ratio": round(after / before, 4),
        "quantised_layers": len(work.plan),
        "weight_error": round(work.errors.relative, 6),
        "worst_layer": {"name": work.errors.worst[1], "weight_error": round(work.errors.worst[0], 6)},
    }
    if settings.perplexity_windows:
        card |= _perplexities(settings, job, weights, work.merged)
    return Made(ask=ask, card=card)


def _prepare(settings: PtqSettings, job: Job) -> RoundingWork:
    from ...adapters.lora_deltas import LoraDeltas
    from ...checkpoints.checkpoint_files import CheckpointReader
    from ...checkpoints.compressed_tensors import linear_layers
    from .rounding import RoundingWork

    reader = CheckpointReader(job.model)
    layers = linear_layers(reader)
    plan = settings.plan(layers)
    check_plan(plan, layers)
    if settings.rounding == "gptq" and not job.rows:
        raise RecipeError(
            "gptq has no calibration data",
            expected="rows of the asks that the variant is for",
            remedy="Add `data` to the recipe, or set rounding: rtn.",
        )
    merged = None
    if job.adapter is not None and settings.adapter == "merge":
        merged = LoraDeltas(job.adapter, job.model)
    return RoundingWork(settings, reader, layers, plan, merged)


def _with_progress(rounded: Iterable[Rounded], work: RoundingWork, job: Job) -> Iterator[Rounded]:
    """Pass on layers, saying how many are done, and the relative error of the weights so far."""
    began_s = time.monotonic()
    for layer in rounded:
        yield layer
        if job.on_progress is not None:
            done, layers = work.errors.layers, len(work.plan)
            left_s = (time.monotonic() - began_s) / done * (layers - done)
            job.on_progress(Progress(done, layers, work.errors.relative, "relative error", left_s))


def _perplexities(settings: PtqSettings, job: Job, weights: Path, merged: AddedWeights | None) -> dict[str, Any]:
    from ...checkpoints.perplexity import measure_perplexity, offline_text, text_windows

    name, text = offline_text()
    rows = text_windows(
        open_tokenizer(job.model),
        text,
        count=settings.perplexity_windows,
        tokens=settings.perplexity_window_tokens,
    )
    before, after = measure_perplexity(job.model, rows, merged), measure_perplexity(weights, rows)
    return {
        "perplexity": round(after, 4),
        "perplexity_before": round(before, 4),
        "perplexity_on": {"text": name, "windows": len(rows), "window_tokens": settings.perplexity_window_tokens},
    }


def _average_bits(work: RoundingWork) -> float:
    """Bits of a weight of the linear layers at the mean, scales not counted; what is not rounded counts as stored."""
    bits = weights = 0
    for name, shape in work.layers.items():
        numel, scheme = math.prod(shape), work.plan.get(name)
        bits += numel * (8 * work.reader.dtype(f"{name}.weight").itemsize if scheme is None else scheme.bits)
        weights += numel
    return bits / weights


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


METHOD = Method(
    settings=PtqSettings,
    make=make_ptq,
    makes="weights",
    needs_data=lambda settings: bool(settings.rounding == "gptq"),
    check=check_ptq,
)
