"""LoRA: low-rank updates of the linear layers, trained by answer loss and saved in the peft layout.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3 (W x + (alpha/r) B A x).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...agents.errors import RecipeError
from ..adapters.adapter_writing import lora_config, write_adapter
from ..shelf.variant import AskSpec
from ..training.batches import encode_rows
from ..training.loop import TrainingSettings
from .adapter_training import load_base, load_parent, parent_config
from .method import Job, Made, Method
from .trained import Targets, add_lora, linear_targets, train_job

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
    """Names of the modules that get an update. `all-linear` is every linear layer but the output head."""


def make_lora(settings: LoraSettings, job: Job) -> Made:
    """Train a LoRA adapter into `job.out / "adapter"`, going on from the parent's adapter when there is one.

    Raises: RecipeError (targets that the model does not have, or a rank other than the parent's),
    TrainingError (not finite, rows too long, or a checkpoint of another job).
    """
    import torch
    from peft import get_peft_model_state_dict

    base = load_base(job, settings)
    rows = encode_rows(job.rows, base.tokenizer, max_row_tokens=settings.max_row_tokens)
    targets = linear_targets(base.model, settings.targets)
    tuned = add_lora(
        base.model,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        targets=targets,
        seed=job.seed,
    )
    if job.adapter is not None:
        _check_parent_rank(parent_config(job, "LORA")["r"], settings.rank)
        load_parent(tuned, job.adapter)
    log, card = train_job(job, settings, base, tuned, rows)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in get_peft_model_state_dict(tuned).items()}
    config = lora_config(rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, targets=targets)
    write_adapter(job.out / "adapter", tensors, config, base_name=job.base_name)
    return Made(ask=AskSpec(adapter="lora", rank=settings.rank), card=card, log=log)


def _check_parent_rank(parent_rank: int, rank: int) -> None:
    if parent_rank != rank:
        raise RecipeError(
            f"rank {rank} differs from the parent adapter's rank {parent_rank}",
            expected="the same rank, since training goes on from the parent",
            remedy=f"Set rank: {parent_rank}, or parent: base.",
        )


METHOD = Method(settings=LoraSettings, make=make_lora)
