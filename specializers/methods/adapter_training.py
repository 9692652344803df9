"""What every adapter method starts from: the base model in memory, and the adapter of the parent if it has one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.errors import RecipeError, TrainingError
from ..adapters.adapter_files import PEFT_PREFIX, WEIGHTS, read_config
from ..checkpoints.attention import open_model, register_float32_attention
from ..checkpoints.opened_by_transformers import open_tokenizer
from ..checkpoints.tensor_files import read_json
from ..training.loop import TrainingSettings
from ..training.speed import hold_frozen_weights_in_bfloat16
from .method import Job
from .trained import LoadedBase, Targets, choose_device, linear_targets

if TYPE_CHECKING:
    from ..adapters.lora_deltas import LoraDeltas

__all__ = [
    "check_served_targets",
    "go_on_from_lora",
    "load_base",
    "load_parent",
    "parent_config",
    "served_targets",
]


def load_base(job: Job, settings: TrainingSettings) -> LoadedBase:
    """Load the job's model as the settings' `dtype` asks, on the GPU where there is one.

    Quantised weights are dequantised: the adapter learns on what an engine computes with.
    """
    import torch

    from ..checkpoints.dense_model import load_dense_model

    device, autocast = choose_device(settings)
    # Mixed precision on CPU keeps the residual stream in float32; a GPU holds bigger models, so saves memory.
    dtype = torch.bfloat16 if autocast and device == "cuda" else torch.float32
    mixed_on_cpu = autocast and device == "cpu"
    quantised = "quantization_config" in read_json(job.model, "config.json")
    if quantised:
        model = load_dense_model(job.model, dtype).to(device)
    else:
        attention = register_float32_attention if mixed_on_cpu else None
        model = open_model(job.model, dtype=dtype, attention=attention).to(device)
    if mixed_on_cpu:
        hold_frozen_weights_in_bfloat16(model)
    return LoadedBase(model, open_tokenizer(job.model), device, autocast)


# Layers that transformers fuses and the engine takes adapters for under the names of their parts only.
_FUSED_HERE_ALONE = {"glm": ("gate_up_proj",), "glm4": ("gate_up_proj",)}


def check_served_targets(targets: Targets, job: Job) -> None:
    """Raise RecipeError when the engine would refuse an adapter of layers that are named, after all the training."""
    fused = _FUSED_HERE_ALONE.get(str(read_json(job.model, "config.json").get("model_type")), ())
    wanted = [name for name in targets if name in fused]
    if wanted:
        raise RecipeError(
            f"targets {targets!r} have {wanted[0]}, which the engine knows in parts on this family",
            expected="layers that are one in the engine too",
            remedy="Set targets: [q_proj, k_proj, v_proj, o_proj, down_proj].",
        )


def served_targets(model: Any, targets: Targets) -> list[str]:
    """Names of the linear layers to adapt, of those that the engine takes adapters for; see `linear_targets`."""
    fused = _FUSED_HERE_ALONE.get(model.config.model_type, ())
    return [name for name in linear_targets(model, targets) if name not in fused]


def parent_config(job: Job, peft_type: str) -> dict[str, Any]:
    """Settings of the parent's adapter, which training goes on from.

    Raises: RecipeError when it is of another kind than `peft_type`.
    """
    assert job.adapter is not None
    config = read_config(job.adapter)
    if config.get("peft_type") != peft_type:
        raise RecipeError(
            f"the parent's adapter is of kind {config.get('peft_type')}",
            expected=f"one of kind {peft_type}, since training goes on from it",
            remedy="Set parent: base, or name a parent made by the same method.",
        )
    return config


def go_on_from_lora(tuned: Any, parent: LoraDeltas) -> None:
    """Let `tuned`, with fresh LoRA of at least the parent's rank, compute exactly what the parent's LoRA computes.

    The two may differ in scaling, in ranks by layer and in layers: what the parent leaves alone starts at no change.
    Raises: TrainingError when the parent adapts other layers.
    """
    import torch

    adapted = {
        name.removeprefix(PEFT_PREFIX): module for name, module in tuned.named_modules() if hasattr(module, "lora_A")
    }
    others = sorted(parent.layers - adapted.keys())
    if others:
        raise TrainingError(
            f"the parent adapter has tensors for other layers: {others[:3]}",
            expected="the same targets as the recipe's",
            remedy="Name them in `targets`, or set parent: base.",
        )
    for layer in parent.layers:
        module, (a, b) = adapted[layer], parent.factors(layer)
        ours, rank = module.active_adapters[0], len(a)
        with torch.no_grad():
            module.lora_A[ours].weight[:rank] = a
            module.lora_B[ours].weight.zero_()
            module.lora_B[ours].weight[:, :rank] = b / module.scaling[ours]


def load_parent(tuned: Any, adapter: Path) -> None:
    """Let `tuned` start from the parent's tensors, which must mean the same in both: T-REX has no scaling.

    Raises: TrainingError when the parent has tensors for other layers.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    missed = set_peft_model_state_dict(tuned, load_file(adapter / WEIGHTS))
    if missed.unexpected_keys:
        raise TrainingError(
            f"the parent adapter has tensors for other layers: {missed.unexpected_keys[:3]}",
            expected="the same targets as the recipe's",
        )
