"""LoRA: low-rank updates of the linear layers, trained by answer loss and saved in the peft layout.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3 (W x + (alpha/r) B A x).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...agents.errors import RecipeError, TrainingError
from ..shelf.variant import AskSpec
from ..training.batches import encode_rows
from ..training.loop import TrainingSettings, train
from .adapter_training import Targets, final_loss, linear_targets, load_base, parent_config, save_adapter
from .method import Job, Made, Method

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
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    base = load_base(job, settings)
    rows = encode_rows(job.rows, base.tokenizer, max_row_tokens=settings.max_row_tokens)
    targets = linear_targets(base.model, settings.targets)
    torch.manual_seed(job.seed)  # peft draws the first A from the global generator
    tuned = get_peft_model(
        base.model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
        ),
        autocast_adapter_dtype=True,
    )
    if job.adapter is not None:
        _check_parent_rank(parent_config(job, "LORA")["r"], settings.rank)
        _load_parent(tuned, job.adapter)
    log = train(
        tuned,
        rows,
        settings,
        seed=job.seed,
        pad_token=base.pad_token,
        checkpoint=job.work_dir / "checkpoint.safetensors",
        job=job.fingerprint,
        device=base.device,
        autocast=base.autocast,
        on_progress=job.on_progress,
    )
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in get_peft_model_state_dict(tuned).items()}
    config = {
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": targets,
        "use_dora": False,
        "use_rslora": False,
    }
    save_adapter(job, tensors, config)
    card = {"final_loss": final_loss(log), "steps": len(log), "rows": len(rows)}
    return Made(ask=AskSpec(adapter="lora", rank=settings.rank), card=card, log=log)


def _check_parent_rank(parent_rank: int, rank: int) -> None:
    if parent_rank != rank:
        raise RecipeError(
            f"rank {rank} differs from the parent adapter's rank {parent_rank}",
            expected="the same rank, since training goes on from the parent",
            remedy=f"Set rank: {parent_rank}, or parent: base.",
        )


def _load_parent(tuned: Any, adapter: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    missed = set_peft_model_state_dict(tuned, load_file(adapter / "adapter_model.safetensors"))
    if missed.unexpected_keys:
        raise TrainingError(
            f"the parent adapter has tensors for other layers: {missed.unexpected_keys[:3]}",
            expected="the same targets as the recipe's",
        )


METHOD = Method(settings=LoraSettings, make=make_lora)
