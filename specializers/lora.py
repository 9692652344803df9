"""LoRA: low-rank updates of the linear layers, trained by answer loss and saved in the peft layout.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3 (W x + (alpha/r) B A x).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..agents.errors import RecipeError, TrainingError
from .methods import Job, Made, Method
from .training import TrainingSettings, multiplies_bfloat16, train
from .training_batches import encode_rows
from .variant import AskSpec

__all__ = ["METHOD", "LoraSettings", "make_lora"]


class LoraSettings(TrainingSettings):
    """Settings of LoRA. `targets` are module names; `all-linear` is every linear layer but the output head."""

    method: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=512)
    alpha: float = Field(default=16.0, gt=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


def make_lora(settings: LoraSettings, job: Job) -> Made:
    """Train a LoRA adapter into `job.out / "adapter"`, going on from the parent's adapter when there is one.

    Raises: RecipeError (targets that the model does not have, or a rank other than the parent's),
    TrainingError (not finite, rows too long, or a checkpoint of another job).
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = settings.dtype == "bfloat16" or (settings.dtype == "auto" and multiplies_bfloat16(device))
    # Mixed precision on CPU keeps the residual stream in float32; a GPU holds bigger models, so saves memory.
    dtype = torch.bfloat16 if autocast and device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = encode_rows(job.rows, tokenizer, max_row_tokens=settings.max_row_tokens)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).to(device)
    targets = _targets(model, settings)
    torch.manual_seed(job.seed)  # peft draws the first A from the global generator
    tuned = get_peft_model(
        model,
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
        _load_parent(tuned, job.adapter, settings.rank)
    log = train(
        tuned,
        rows,
        settings,
        seed=job.seed,
        pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        checkpoint=job.work_dir / "checkpoint.safetensors",
        job=job.fingerprint,
        device=device,
        autocast=autocast,
        on_progress=job.on_progress,
    )
    _save_adapter(tuned, settings, targets, job)
    last = [entry["loss"] for entry in log[-25:]]
    card = {"final_loss": round(sum(last) / len(last), 5), "steps": len(log), "rows": len(rows)}
    return Made(ask=AskSpec(adapter="lora", rank=settings.rank), card=card, log=log)


def _targets(model: Any, settings: LoraSettings) -> list[str]:
    import torch

    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if settings.targets == "all-linear":
        return sorted(linear)
    unknown = sorted(set(settings.targets) - linear)
    if unknown or not settings.targets:
        raise RecipeError(
            f"targets {unknown or '[]'} name no linear layer of this model",
            expected=f"some of {', '.join(sorted(linear))}, or all-linear",
            remedy="Correct `targets` in the recipe.",
        )
    return sorted(settings.targets)


def _load_parent(tuned: Any, adapter: Path, rank: int) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    parent_rank = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    if parent_rank != rank:
        raise RecipeError(
            f"rank {rank} differs from the parent adapter's rank {parent_rank}",
            expected="the same rank, since training goes on from the parent",
            remedy=f"Set rank: {parent_rank}, or parent: base.",
        )
    missed = set_peft_model_state_dict(tuned, load_file(adapter / "adapter_model.safetensors"))
    if missed.unexpected_keys:
        raise TrainingError(
            f"the parent adapter has tensors for other layers: {missed.unexpected_keys[:3]}",
            expected="the same targets as the recipe's",
        )


def _save_adapter(tuned: Any, settings: LoraSettings, targets: list[str], job: Job) -> None:
    """Write the peft layout by hand: same bytes for the same weights, and no path of this machine inside."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = job.out / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(tuned).items())
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": job.base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


METHOD = Method(settings=LoraSettings, make=make_lora)
