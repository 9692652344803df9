"""Adapter folders of our own, in the peft layout: the same bytes for the same tensors, and no path of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.tensor_files import base_tensors
from .adapter_files import CONFIG, PEFT_PREFIX, WEIGHTS

if TYPE_CHECKING:
    import torch

__all__ = ["lora_config", "write_adapter", "write_lora"]


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, base_name: str
) -> None:
    """Write tensors, by peft's own keys, and the config of their kind into a folder, which is made if need be."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(on_cpu, folder / WEIGHTS, metadata={"format": "pt"})
    shared = {"base_model_name_or_path": base_name, "inference_mode": True, "task_type": "CAUSAL_LM"}
    text = json.dumps({**shared, **config}, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def lora_config(*, rank: int, alpha: float, targets: Iterable[str], dropout: float = 0.0) -> dict[str, Any]:
    """What `adapter_config.json` says of a plain LoRA."""
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(targets),
        "use_dora": False,
        "use_rslora": False,
    }


def write_lora(
    folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], *, rank: int, base: Path, bf16: bool = False
) -> None:
    """Write a LoRA adapter folder of scaling 1, from a [<= rank, d_in] and b [d_out, <= rank] by layer.

    Layers of a lower rank are filled up with zeros. Values are float32, or bfloat16 with `bf16`.
    """
    import torch

    dtype = torch.bfloat16 if bf16 else torch.float32
    tensors: dict[str, torch.Tensor] = {}
    for module, (a, b) in factors.items():
        missing = rank - a.shape[0]
        key = f"{PEFT_PREFIX}{module}.lora_"
        tensors[f"{key}A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).to(dtype)
        tensors[f"{key}B.weight"] = torch.nn.functional.pad(b, (0, missing)).to(dtype)
    config = lora_config(rank=rank, alpha=rank, targets=_targets(factors, base))
    write_adapter(folder, tensors, config, base_name=base.name)


def _targets(modules: Iterable[str], base: Path) -> list[str]:
    """Last parts of the modules' names where those name exactly these modules in the base, else whole names."""
    last = {module.rpartition(".")[2] for module in modules}
    there = {name.removesuffix(".weight") for name in base_tensors(base) if name.endswith(".weight")}
    named = {module for module in there if module.rpartition(".")[2] in last}
    return sorted(last if named == set(modules) else modules)
