"""What every adapter method starts from and ends with: the base model in memory, and an adapter folder on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...agents.errors import RecipeError
from ..training.loop import TrainingSettings, multiplies_bfloat16
from ..training.speed import hold_frozen_weights_in_bfloat16, register_float32_attention
from .method import Job

if TYPE_CHECKING:
    import torch

__all__ = ["LoadedBase", "Targets", "final_loss", "linear_targets", "load_base", "parent_config", "save_adapter"]

Targets = Literal["all-linear"] | tuple[str, ...]


@dataclass(frozen=True)
class LoadedBase:
    """A base model ready to be adapted: where it is, and whether its products run in bfloat16."""

    model: Any
    tokenizer: Any
    device: str
    autocast: bool

    @property
    def pad_token(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


def load_base(job: Job, settings: TrainingSettings) -> LoadedBase:
    """Load the job's model as the settings' `dtype` asks, on the GPU where there is one.

    Quantised weights are dequantised: the adapter learns on what an engine computes with.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..checkpoints.layer_stream import load_dense_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = settings.dtype == "bfloat16" or (settings.dtype == "auto" and multiplies_bfloat16(device))
    # Mixed precision on CPU keeps the residual stream in float32; a GPU holds bigger models, so saves memory.
    dtype = torch.bfloat16 if autocast and device == "cuda" else torch.float32
    mixed_on_cpu = autocast and device == "cpu"
    quantised = "quantization_config" in json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    if quantised:
        model = load_dense_model(job.model, dtype).to(device)
    else:
        attention = {"attn_implementation": register_float32_attention()} if mixed_on_cpu else {}
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **attention).to(device)
    if mixed_on_cpu:
        hold_frozen_weights_in_bfloat16(model)
    return LoadedBase(model, AutoTokenizer.from_pretrained(job.model), device, autocast)


def linear_targets(model: Any, targets: Targets) -> list[str]:
    """Names of the linear layers to adapt, sorted; `all-linear` is all but the output head.

    Raises: RecipeError for a name that no linear layer has.
    """
    import torch

    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if targets == "all-linear":
        return sorted(linear)
    unknown = sorted(set(targets) - linear)
    if unknown or not targets:
        raise RecipeError(
            f"targets {unknown or '[]'} name no linear layer of this model",
            expected=f"some of {', '.join(sorted(linear))}, or all-linear",
            remedy="Correct `targets` in the recipe.",
        )
    return sorted(targets)


def parent_config(job: Job, peft_type: str) -> dict[str, Any]:
    """Settings of the parent's adapter, which training goes on from.

    Raises: RecipeError when it is of another kind than `peft_type`.
    """
    assert job.adapter is not None
    config: dict[str, Any] = json.loads((job.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != peft_type:
        raise RecipeError(
            f"the parent's adapter is of kind {config.get('peft_type')}",
            expected=f"one of kind {peft_type}, since training goes on from it",
            remedy="Set parent: base, or name a parent made by the same method.",
        )
    return config


def save_adapter(job: Job, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write `job.out / "adapter"` by hand: same bytes for the same weights, and no path of this machine inside."""
    from safetensors.torch import save_file

    folder = job.out / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(on_cpu, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shared = {"base_model_name_or_path": job.base_name, "inference_mode": True, "task_type": "CAUSAL_LM"}
    text = json.dumps({**shared, **config}, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def final_loss(log: Sequence[Mapping[str, float]]) -> float:
    """Mean loss of the last 25 steps, nats per answer token."""
    last = [entry["loss"] for entry in log[-25:]]
    return round(sum(last) / len(last), 5)
