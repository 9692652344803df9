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
from .pruned_check import check_pruned

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
    stack = _Stack(model)
    kept = _choose(settings, job, stack, base.layers)
    tensors = {}
    for name, tensor in dense_tensors(model).items():
        renamed = renumber(name, kept)
        if renamed is not None:
            tensors[renamed] = tensor
    stack.keep(kept)
    config = {**base.config, "num_hidden_layers": len(kept), **stack.lists_of(kept)}
    check_pruned(model, tensors, config)
    write_dense(job.out / "weights", tensors, config)
    dropped = [layer for layer in range(base.layers) if layer not in kept]
    return Made(
        ask=AskSpec(), card={"score": settings.score, "dropped": dropped, **size_card(job.out / "weights", base)}
    )


class _Stack:
    """A model's blocks, of which any can be left out."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = list(model.model.layers)
        # What the config says of every block; also what transformers derived and no file spells out.
        lists = {name: getattr(model.config, name, None) for name in ("layer_types", "no_rope_layers")}
        self._lists = {name: list(values) for name, values in lists.items() if values is not None}

    def lists_of(self, kept: Sequence[int]) -> dict[str, list[Any]]:
        """The config's lists with the entries of the kept blocks only."""
        return {name: [values[layer] for layer in kept] for name, values in self._lists.items()}

    def keep(self, kept: Sequence[int]) -> None:
        """Let the model be these blocks only."""
        import torch

        for number, layer in enumerate(kept):
            self.blocks[layer].self_attn.layer_idx = number  # where its keys and values are in the cache
        self.model.model.layers = torch.nn.ModuleList(self.blocks[layer] for layer in kept)
        self.model.config.num_hidden_layers = len(kept)
        for name, values in self.lists_of(kept).items():
            setattr(self.model.config, name, values)


def _choose(settings: DepthPruningSettings, job: Job, stack: _Stack, layers: int) -> list[int]:
    """The blocks that stay, ascending."""
    if settings.score == "random":
        return sorted(random.Random(job.seed).sample(range(layers), settings.layers))
    rows = calibration_rows(settings, job)
    if settings.score == "loss":
        return _least_loss(settings.layers, job, stack, rows)
    importance = _mean_importance(stack.model, rows)
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


def _least_loss(count: int, job: Job, stack: _Stack, rows: Sequence[EncodedRow]) -> list[int]:
    """Drop one block at a time until `count` stay, each time the one whose absence leaves the lowest answer loss."""
    blocks = len(stack.blocks)
    kept = list(range(blocks))
    stack.model.eval()
    while len(kept) > count:
        losses = {layer: _loss_with(stack, [k for k in kept if k != layer], rows) for layer in kept}
        worst = min(losses, key=lambda layer: (losses[layer], layer))
        kept.remove(worst)
        if job.on_progress is not None:
            job.on_progress(Progress(blocks - len(kept), blocks - count, losses[worst]))
    stack.keep(range(blocks))
    return kept


def _loss_with(stack: _Stack, kept: Sequence[int], rows: Sequence[EncodedRow]) -> float:
    import torch

    stack.keep(kept)
    total = tokens = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = rows[start : start + _BATCH_ROWS]
            answers = sum(len(row.tokens) - row.prompt_tokens for row in batch)
            total += answers * float(answer_loss(stack.model, batch, pad_token=0))
            tokens += answers
    return total / tokens


METHOD = Method(
    settings=DepthPruningSettings,
    make=make_depth_pruning,
    makes="weights",
    needs_data=lambda settings: settings.score != "random",
    check=check_depth_pruning,
)
