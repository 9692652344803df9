"""Writing a plain checkpoint that stock loaders open: dense tensors and a config, no record of how it was made."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.errors import TrainingError
from .output_head import HEAD
from .prunable_models import PrunableModel, read_prunable

if TYPE_CHECKING:
    import torch

__all__ = ["dense_tensors", "fold_adapters", "size_card", "write_dense"]

# Config entries that say where a checkpoint came from, not what it is.
_ORIGIN = ("_name_or_path", "transformers_version")


def fold_adapters(tuned: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The dense tensors W + (alpha/r) B A of a model tuned with peft's LoRA, under the base's own names, one by one."""
    model = tuned.base_model.model
    for name, tensor in dense_tensors(model).items():
        if ".base_layer." not in name and ".lora_" not in name:
            yield name, tensor
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            layer = module.base_layer
            delta = sum(module.get_delta_weight(adapter).detach() for adapter in module.active_adapters)
            yield f"{name}.weight", layer.weight.detach() + delta
            if layer.bias is not None:
                yield f"{name}.bias", layer.bias.detach()


def dense_tensors(model: Any) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face model by name, a tied head once: what the weights say, not the config."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if not (tied and name == HEAD)}


def write_dense(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, in the config's dtype (bfloat16 when it has none).

    The config says of the output head what the tensors say: with one of its own it is not tied. The same
    tensors give the same bytes; no path of this machine gets in.
    Raises: TrainingError when a value is not finite, OSError when the disk is full.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    name_of_dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = getattr(torch, name_of_dtype)
    cast = {name: tensor.to(dtype).cpu().contiguous() for name, tensor in sorted(tensors.items())}
    for name, tensor in cast.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"{name} of the new checkpoint holds values that are not finite",
                expected="finite numbers",
                remedy="Its training diverged: make it again with a lower learning_rate.",
            )
    folder.mkdir(parents=True, exist_ok=True)
    known = {key: value for key, value in config.items() if key not in (*_ORIGIN, "torch_dtype")}
    if HEAD in cast:
        known["tie_word_embeddings"] = False
    text = json.dumps({**known, "dtype": name_of_dtype}, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    try:
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the system's own error, and says it in its text only
        raise OSError(errno.EIO, str(error), str(folder / "model.safetensors")) from error


def size_card(made: Path, base: PrunableModel) -> dict[str, Any]:
    """What a card says of a pruned checkpoint's size: parameters with and without embeddings, and their ratios."""
    pruned = read_prunable(made)
    inner, base_inner = (model.parameters - model.embedding_parameters for model in (pruned, base))
    return {
        "architecture": pruned.family.architecture,
        "hidden_size": pruned.hidden_size,
        "intermediate_size": pruned.intermediate_size,
        "layers": pruned.layers,
        "tied_head": pruned.tied,
        "parameters": pruned.parameters,
        "parameters_of_base": round(pruned.parameters / base.parameters, 4),
        "non_embedding_parameters": inner,
        "non_embedding_of_base": round(inner / base_inner, 4),
    }
