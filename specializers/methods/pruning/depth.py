"""Depth pruning: drop whole blocks, without training.

Sources: layer importance as -cosine(block input, block output), arXiv 2406.17415 (LIM); that errors of layers do not
add up, so that dropping is best judged on what is left, EvoPress (arXiv 2410.14649).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ....agents.errors import RecipeError
from ....agents.frozen_model import FrozenModel
from ...checkpoints.dense_checkpoint import dense_tensors, size_card, write_dense
from ...checkpoints.prunable_models import read_prunable
from ...shelf.variant import AskSpec
from ...training.batches import EncodedRow
from ...training.loop import Progress
from ...training.objective import answer_loss
from ..calibration import calibration_rows, hooked, run_rows
from ..method import Job, Made, Method
from ..tunable import load_folded

if TYPE_CHECKING:
    import torch

__all__ = ["METHOD", "DepthPruningSettings", "block_importance", "make_depth_pruning", "renumber"]

_BATCH_ROWS = 8


class DepthPruningSettings(FrozenModel):
    """Settings of depth pruning.

    >>> DepthPruningSettings(layers=24, score="loss").calibration_rows
    32
    """

    method: Literal["depth_pruning"] = "depth_pruning"

    layers: int = Field(ge=1)
    """Blocks that stay."""

    score: Literal["cosine", "loss", "random"] = "cosine"
    """How blocks are chosen. `cosine` drops those that turn their input least. `loss` drops one at a time, always the
    one whose absence costs the rows' answers least, so it measures what blocks do together (layers² passes). `random`
    is the control."""

    calibration_rows: int = Field(default=32, ge=1)
    """Rows of the recipe that the score is taken on."""

    max_row_tokens: int = Field(default=1024, ge=8)
    """Most tokens of one row. A longer one is an error."""


def block_importance(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """-cosine of a block's input and output, [tokens] from [tokens, d] each: high where the block turns it most."""
    import torch

    return -torch.nn.functional.cosine_similarity(inputs, outputs, dim=-1)


def renumber(name: str, kept: Sequence[int]) -> str | None:
    """A tensor's name in a model of the kept blocks only, None when its block is dropped."""
    prefix = "model.layers."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{kept.index(int(number))}.{rest}" if int(number) in kept else None


def check_depth_pruning(settings: DepthPruningSettings, job: Job) -> None:
    """Raises: RecipeError for no fewer blocks than there are, or an unknown model."""
    layers = read_prunable(job.model).layers
    if settings.layers >= layers:
        raise RecipeError(
            f"layers {settings.layers} are no fewer than the model's {layers}",
            expected=f"1 to {layers - 1} layers",
            remedy=f"Set layers to {layers * 4 // 5} to drop a fifth.",
        )


def make_depth_pruning(settings: DepthPruningSettings, job: Job) -> Made:
    """Prune the job's model into `job.out / "weights"`; a LoRA that came before is folded in first.

    Raises: RecipeError as `check_depth_pruning`, TrainingError for no calibration rows or one that is too long,
    OSError when the disk is full.
    """
    check_depth_pruning(settings, job)
    base = read_prunable(job.model)
    model = load_folded(job)
    kept = _choose(settings, job, model, base.layers)
    tensors = {}
    for name, tensor in dense_tensors(model).items():
        renamed = renumber(name, kept)
        if renamed is not None:
            tensors[renamed] = tensor
    config = {**base.config, "num_hidden_layers": len(kept)}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = [config["layer_types"][layer] for layer in kept]
    write_dense(job.out / "weights", tensors, config)
    dropped = [layer for layer in range(base.layers) if layer not in kept]
    return Made(
        ask=AskSpec(), card={"score": settings.score, "dropped": dropped, **size_card(job.out / "weights", base)}
    )


def _choose(settings: DepthPruningSettings, job: Job, model: Any, layers: int) -> list[int]:
    """The blocks that stay, ascending."""
    if settings.score == "random":
        return sorted(random.Random(job.seed).sample(range(layers), settings.layers))
    rows = calibration_rows(settings, job)
    if settings.score == "loss":
        return _least_loss(settings.layers, job, model, rows)
    importance = _mean_importance(model, rows)
    return sorted(sorted(range(layers), key=lambda layer: -importance[layer])[: settings.layers])


def _mean_importance(model: Any, rows: Sequence[EncodedRow]) -> list[float]:
    """Mean of `block_importance` over all tokens of the rows, one number per block."""
    blocks = list(model.model.layers)
    sums = [0.0] * len(blocks)

    def adder(layer: int) -> Any:
        def add(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            sums[layer] += float(block_importance(inputs[0].flatten(0, -2), after.flatten(0, -2)).double().sum())

        return add

    with hooked([block.register_forward_hook(adder(layer)) for layer, block in enumerate(blocks)]):
        run_rows(model, rows)
    return [total / sum(len(row.tokens) for row in rows) for total in sums]


def _least_loss(count: int, job: Job, model: Any, rows: Sequence[EncodedRow]) -> list[int]:
    """Drop one block at a time until `count` stay, each time the one whose absence leaves the lowest answer loss."""
    blocks = list(model.model.layers)
    kept = list(range(len(blocks)))
    steps = len(blocks) - count
    model.eval()
    while len(kept) > count:
        losses = {layer: _loss_with(model, blocks, [k for k in kept if k != layer], rows) for layer in kept}
        worst = min(losses, key=lambda layer: (losses[layer], layer))
        kept.remove(worst)
        if job.on_progress is not None:
            job.on_progress(Progress(len(blocks) - len(kept), steps, losses[worst]))
    _put_blocks(model, blocks, range(len(blocks)))
    return kept


def _loss_with(model: Any, blocks: Sequence[Any], kept: Sequence[int], rows: Sequence[EncodedRow]) -> float:
    import torch

    _put_blocks(model, blocks, kept)
    total = tokens = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            answers = sum(len(row.tokens) - row.prompt_tokens for row in batch)
            total += answers * float(answer_loss(model, batch, pad_token=0))
            tokens += answers
    return total / tokens


def _put_blocks(model: Any, blocks: Sequence[Any], kept: Sequence[int]) -> None:
    import torch

    for number, layer in enumerate(kept):
        blocks[layer].self_attn.layer_idx = number  # where its keys and values are in the cache
    model.model.layers = torch.nn.ModuleList(blocks[layer] for layer in kept)
    model.config.num_hidden_layers = len(kept)


METHOD = Method(
    settings=DepthPruningSettings,
    make=make_depth_pruning,
    makes="weights",
    needs_data=lambda settings: settings.score != "random",
    check=check_depth_pruning,
)
