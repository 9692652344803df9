"""What every adapter method starts from and ends with: the base model in memory, and an adapter folder on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.errors import RecipeError, TrainingError
from ..checkpoints.tensor_files import read_json
from ..training.loop import TrainingSettings
from ..training.speed import hold_frozen_weights_in_bfloat16, register_float32_attention
from .method import Job
from .trained import LoadedBase, choose_device

if TYPE_CHECKING:
    import torch

__all__ = ["load_base", "load_parent", "parent_config", "save_adapter"]


def load_base(job: Job, settings: TrainingSettings) -> LoadedBase:
    """Load the job's model as the settings' `dtype` asks, on the GPU where there is one.

    Quantised weights are dequantised: the adapter learns on what an engine computes with.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..checkpoints.layer_stream import load_dense_model

    device, autocast = choose_device(settings)
    # Mixed precision on CPU keeps the residual stream in float32; a GPU holds bigger models, so saves memory.
    dtype = torch.bfloat16 if autocast and device == "cuda" else torch.float32
    mixed_on_cpu = autocast and device == "cpu"
    quantised = "quantization_config" in read_json(job.model, "config.json")
    if quantised:
        model = load_dense_model(job.model, dtype).to(device)
    else:
        attention = {"attn_implementation": register_float32_attention()} if mixed_on_cpu else {}
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **attention).to(device)
    if mixed_on_cpu:
        hold_frozen_weights_in_bfloat16(model)
    return LoadedBase(model, AutoTokenizer.from_pretrained(job.model), device, autocast)


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


def load_parent(tuned: Any, adapter: Path) -> None:
    """Let `tuned` start from the parent's adapter. Raises: TrainingError when that has tensors for other layers."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    missed = set_peft_model_state_dict(tuned, load_file(adapter / "adapter_model.safetensors"))
    if missed.unexpected_keys:
        raise TrainingError(
            f"the parent adapter has tensors for other layers: {missed.unexpected_keys[:3]}",
            expected="the same targets as the recipe's",
        )


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
