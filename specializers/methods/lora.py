"""LoRA: low-rank updates of the linear layers, trained by answer loss and saved in the peft layout.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3 (W x + (alpha/r) B A x).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...agents.errors import RecipeError
from ..adapters.adapter_writing import lora_config, write_adapter
from ..shelf.variant import AskSpec
from ..training.batches import encode_rows
from ..training.loop import TrainingSettings
from .adapter_training import check_served_targets, go_on_from_lora, load_base, parent_config, served_targets
from .method import Job, Made, Method
from .trained import Targets, add_lora, train_job

if TYPE_CHECKING:
    from ..adapters.lora_deltas import LoraDeltas

__all__ = ["METHOD", "LoraSettings", "make_lora"]


class LoraSettings(TrainingSettings):
    """Settings of LoRA.

    >>> LoraSettings(rank=16, alpha=32.0, targets=("q_proj", "v_proj")).rank
    16
    """

    method: Literal["lora"] = "lora"

    rank: int = Field(default=8, ge=1, le=512)
    """Rank of the update."""

    alpha: float = Field(default=16.0, gt=0.0)
    """The update is scaled by alpha ÷ rank."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the update's inputs that are set to 0 in training."""

    targets: Targets = "all-linear"
    """Names of the modules that get an update. `all-linear` is every linear layer that the engine takes
    adapters for, but the output head."""


def make_lora(settings: LoraSettings, job: Job) -> Made:
    """Train a LoRA adapter into `job.out / "adapter"`, going on from the parent's adapter when there is one.

    Raises: RecipeError (targets that the model does not have, or a rank other than the parent's),
    TrainingError (not finite, rows too long, or a checkpoint of another job).
    """
    import torch
    from peft import get_peft_model_state_dict

    parent = _parent(settings, job)
    base = load_base(job, settings)
    rows = encode_rows(job.rows, base.tokenizer, max_row_tokens=settings.max_row_tokens, template=job.template)
    targets = served_targets(base.model, settings.targets)
    tuned = add_lora(
        base.model,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        targets=targets,
        seed=job.seed,
    )
    if parent is not None:
        go_on_from_lora(tuned, parent)
    log, card = train_job(job, settings, base, tuned, rows)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in get_peft_model_state_dict(tuned).items()}
    config = lora_config(rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, targets=targets)
    write_adapter(job.out / "adapter", tensors, config, base_name=job.base_name)
    return Made(ask=AskSpec(adapter="lora", rank=settings.rank), card=card, log=log)


def _check(settings: LoraSettings, job: Job) -> None:
    check_served_targets(settings.targets, job)
    _parent(settings, job)


def _parent(settings: LoraSettings, job: Job) -> LoraDeltas | None:
    """What the parent's LoRA computes, None without one; raises RecipeError when training cannot go on from it."""
    if job.adapter is None:
        return None
    from ..adapters.lora_deltas import LoraDeltas

    parent_config(job, "LORA")
    parent = LoraDeltas(job.adapter, job.model)
    if parent.rank != settings.rank:
        raise RecipeError(
            f"rank {settings.rank} differs from the parent adapter's rank {parent.rank}",
            expected="the same rank, since training goes on from the parent",
            remedy=f"Set rank: {parent.rank}, or parent: base.",
        )
    if settings.targets != "all-linear":
        others = sorted({layer.rpartition(".")[2] for layer in parent.layers} - set(settings.targets))
        if others:
            raise RecipeError(
                f"the parent's adapter changes {others[0]}, which is not among targets {sorted(settings.targets)}",
                expected="its layers among the recipe's targets, since training goes on from the parent",
                remedy=f"Add {', '.join(others)} to `targets`, or set parent: base.",
            )
    return parent


METHOD = Method(settings=LoraSettings, make=make_lora, check=_check)
