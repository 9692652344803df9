"""MLP-width pruning: drop the least important neurons of every gated MLP, without training.

Sources: maximum absolute weight (MAW), "Fragile Knowledge, Robust Instruction-Following" (arXiv 2512.22671); the
activation score is Wanda's |W| ||X|| (arXiv 2306.11695), taken over what a neuron adds to the residual stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ....agents.frozen_model import FrozenModel
from ...checkpoints.dense_checkpoint import dense_tensors, size_card, write_dense
from ...checkpoints.prunable_models import WIDTH_STEP, check_width, read_prunable
from ...shelf.variant import AskSpec
from ..calibration import calibration_rows, hooked, run_rows
from ..method import Job, Made, Method
from ..tunable import load_folded
from .pruned_check import check_pruned

if TYPE_CHECKING:
    import torch

__all__ = ["METHOD", "WidthPruningSettings", "activation_scores", "keep_neurons", "make_width_pruning", "maw_scores"]


class WidthPruningSettings(FrozenModel):
    """Settings of MLP-width pruning.

    >>> WidthPruningSettings(intermediate_size=1024).score
    'maw'
    """

    method: Literal["width_pruning"] = "width_pruning"

    intermediate_size: int = Field(ge=WIDTH_STEP)
    """Neurons that stay in every layer."""

    score: Literal["maw", "activation", "random"] = "maw"
    """How neurons are ranked. `maw` (largest weights) needs the weights only, `activation` weighs them by what the
    recipe's rows excite, `random` is the control."""

    calibration_rows: int = Field(default=32, ge=1)
    """Rows of the recipe for `score: activation`."""

    max_row_tokens: int = Field(default=1024, ge=8)
    """Most tokens of one row. A longer one is an error."""


def maw_scores(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Importance [n] of the neurons of a gated MLP: max |w| over its gate row plus max |w| over its up row, [n, d]."""
    return gate.abs().amax(dim=1) + up.abs().amax(dim=1)


def activation_scores(mean_square: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Importance [n] by what a neuron adds: root mean square of its activation times the norm of its column, [d, n]."""
    return mean_square.sqrt() * down.norm(dim=0)


def keep_neurons(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` highest scores, ascending; among equals the first ones."""
    import torch

    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


def check_width_pruning(settings: WidthPruningSettings, job: Job) -> None:
    """Raises: RecipeError for a width that is no smaller or that kernels do not take, or an unknown model."""
    check_width("intermediate_size", settings.intermediate_size, read_prunable(job.model).intermediate_size)


def make_width_pruning(settings: WidthPruningSettings, job: Job) -> Made:
    """Prune the job's model into `job.out / "weights"`; a LoRA that came before is folded in first.

    Raises: RecipeError as `check_width_pruning`, TrainingError for no calibration rows, one that is too long, or when
    the smaller model does not compute what the model does without those neurons, OSError when the disk is full.
    """
    import torch

    check_width_pruning(settings, job)
    base = read_prunable(job.model)
    model = load_folded(job)
    tensors = dense_tensors(model)
    scores = _scores(settings, job, model, tensors, base.layers)
    for layer, score in enumerate(scores):
        keep = keep_neurons(score, settings.intermediate_size)
        prefix = f"model.layers.{layer}.mlp."
        down = tensors[f"{prefix}down_proj.weight"]
        tensors[f"{prefix}down_proj.weight"] = down.index_select(1, keep)
        for name, parts in (("gate_proj", 1), ("up_proj", 1), ("gate_up_proj", 2)):
            for kind in ("weight", "bias"):
                if (tensor := tensors.get(f"{prefix}{name}.{kind}")) is not None:
                    tensors[f"{prefix}{name}.{kind}"] = torch.cat([part[keep] for part in tensor.chunk(parts)])
        # The model itself without those neurons is what the smaller one is checked against.
        dropped = torch.ones(down.shape[1], dtype=torch.bool).index_fill_(0, keep, False)
        model.get_submodule(f"{prefix}down_proj").weight.data[:, dropped] = 0.0
    config = {**base.config, "intermediate_size": settings.intermediate_size}
    check_pruned(model, tensors, config)
    write_dense(job.out / "weights", tensors, config)
    card = {"score": settings.score, **size_card(job.out / "weights", base)}
    return Made(ask=AskSpec(), card=card)


def _scores(
    settings: WidthPruningSettings, job: Job, model: Any, tensors: dict[str, torch.Tensor], layers: int
) -> list[torch.Tensor]:
    import torch

    weights = [_mlp_weights(tensors, f"model.layers.{layer}.mlp.") for layer in range(layers)]
    if settings.score == "maw":
        return [maw_scores(gate, up) for gate, up, _ in weights]
    if settings.score == "random":
        generator = torch.Generator().manual_seed(job.seed)
        return [torch.rand(len(gate), generator=generator) for gate, _, _ in weights]
    squares = _mean_squares(settings, job, model)
    return [activation_scores(square, down) for square, (_, _, down) in zip(squares, weights, strict=True)]


def _mlp_weights(tensors: dict[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate [n, d], up [n, d] and down [d, n] of one MLP, whichever way its family stores the first two."""
    down = tensors[f"{prefix}down_proj.weight"]
    fused = tensors.get(f"{prefix}gate_up_proj.weight")
    if fused is not None:
        gate, up = fused.chunk(2)
        return gate, up, down
    return tensors[f"{prefix}gate_proj.weight"], tensors[f"{prefix}up_proj.weight"], down


def _mean_squares(settings: WidthPruningSettings, job: Job, model: Any) -> list[torch.Tensor]:
    """Mean square of every neuron's activation over the calibration rows' tokens, one [n] per layer."""
    import torch

    rows = calibration_rows(settings, job)
    blocks = model.model.layers
    sums = [torch.zeros(block.mlp.down_proj.in_features, dtype=torch.float64) for block in blocks]

    def adder(total: torch.Tensor) -> Any:
        def add(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            total.add_(inputs[0].double().square().sum(dim=(0, 1)))

        return add

    handles = [
        block.mlp.down_proj.register_forward_pre_hook(adder(total)) for block, total in zip(blocks, sums, strict=True)
    ]
    with hooked(handles):
        run_rows(model, rows)
    tokens = sum(len(row.tokens) for row in rows)
    return [total.float() / tokens for total in sums]


METHOD = Method(
    settings=WidthPruningSettings,
    make=make_width_pruning,
    makes="weights",
    needs_data=lambda settings: settings.score == "activation",
    check=check_width_pruning,
)
