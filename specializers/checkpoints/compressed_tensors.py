"""Checkpoints with few-bit weights in the compressed-tensors format, which vLLM opens as it is.

Layout (https://github.com/vllm-project/compressed-tensors): a quantised layer `m` has
- W8A8, `int-quantized`: `m.weight` int8 [rows, inputs], `m.weight_scale` [rows, 1]; activations are rounded to
  8 bits per token while serving;
- W4A16, `pack-quantized`: `m.weight_packed` int32 [rows, inputs / 8] with eight values a word, lowest bits first,
  each plus 8; `m.weight_scale` [rows, groups]; `m.weight_shape` int64 [2].
`quantization_config` in `config.json` names the layers that have each, and all others as ignored. What is stored is
read back by `stored_weights.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...agents.errors import RecipeError
from .checkpoint_files import AddedWeights, CheckpointReader, CheckpointWriter
from .output_head import HEAD, is_embedding, stores_own_head
from .quantisation_plan import LAYER_NAMES, Scheme, check_plan

__all__ = [
    "Scheme",
    "check_plan",
    "linear_layers",
    "pack_int4",
    "write_compressed",
]

_LAYER = re.compile(rf".+\.({'|'.join(LAYER_NAMES)})\Z")
_EXPERT = re.compile(r"\.experts\.")
_TO_OFFSET = 8  # stored int4 values are 0…15


def linear_layers(reader: CheckpointReader) -> dict[str, tuple[int, ...]]:
    """Names and shapes [rows, inputs] of the layers that can be quantised, in the checkpoint's order of names.

    Raises: RecipeError when there are none by the names we know, or they are quantised already.
    """
    if "quantization_config" in reader.config:
        raise RecipeError(
            f"the weights in {reader.folder.name!r} are quantised already",
            expected="weights in 16 or 32 bits",
            remedy="Start from a parent that is not quantised.",
        )
    layers: dict[str, tuple[int, ...]] = {
        name.removesuffix(".weight"): info.shape
        for name, info in sorted(reader.tensors.items())
        if name.endswith(".weight") and _LAYER.match(name.removesuffix(".weight")) and len(info.shape) == 2
        if not _EXPERT.search(name)
    }
    if not layers:
        raise RecipeError(
            f"model_type {reader.config.get('model_type')!r} has no layers to quantise",
            expected=f"linear layers named {', '.join(LAYER_NAMES)}",
            remedy="Use a model with layers of these names (Llama, Mistral, Qwen, Gemma, Phi-3 and many others).",
        )
    return layers


def write_compressed(
    reader: CheckpointReader,
    target: Path,
    plan: Mapping[str, Scheme],
    quantised: Iterable[tuple[str, torch.Tensor, torch.Tensor]],
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    merged: AddedWeights | None = None,
) -> None:
    """Write the checkpoint of `reader` into the folder `target` with the layers of `plan` quantised.

    `quantised` gives each of those layers once, in any order: name, int8 values [rows, inputs], scales
    [rows, groups]; one is held at a time. All other tensors are copied, with what `merged` adds to them. Writes
    `model.safetensors` and `config.json`. Raises: OSError when the disk is full.
    """
    tensors: dict[str, tuple[torch.dtype, Iterable[int]]] = {}
    copied = []
    for name, info in reader.tensors.items():
        layer = name.removesuffix(".weight")
        if layer in plan and name.endswith(".weight"):
            for part, promised in _stored(plan[layer], info.shape, scale_dtype).items():
                tensors[f"{layer}.{part}"] = promised
        else:
            copied.append(name)
            tensors[name] = (reader.dtype(name), info.shape)
    target.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter(target / "model.safetensors", tensors) as writer:
        for name in copied:
            if merged is not None and name.removesuffix(".weight") in merged.layers:
                writer.write(name, merged.add(name, reader.read(name).float()).to(reader.dtype(name)))
            else:
                writer.copy(name, reader)
        for layer, values, scale in quantised:
            writer.write(f"{layer}.weight_scale", scale.to(scale_dtype))
            if plan[layer].bits == 8:
                writer.write(f"{layer}.weight", values)
            else:
                writer.write(f"{layer}.weight_packed", pack_int4(values))
                writer.write(f"{layer}.weight_shape", torch.tensor(values.shape))
    config = {**reader.config, "quantization_config": _quantization_config(plan, reader)}
    if stores_own_head(reader.folder):
        config["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stored(
    scheme: Scheme, shape: tuple[int, ...], scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, list[int]]]:
    """What a layer of this shape is stored as: part of the name → type and shape."""
    rows, inputs = shape
    groups = inputs // (scheme.group_size or inputs)
    if scheme.bits == 8:
        return {"weight": (torch.int8, [rows, inputs]), "weight_scale": (scale_dtype, [rows, groups])}
    return {
        "weight_packed": (torch.int32, [rows, inputs // 8]),
        "weight_scale": (scale_dtype, [rows, groups]),
        "weight_shape": (torch.int64, [2]),
    }


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Values -8…7 as int8 [rows, inputs], packed eight to a word: int32 [rows, inputs / 8], lowest bits first."""
    nibbles = (values.to(torch.int64) + _TO_OFFSET).view(values.shape[0], -1, 8)
    words = (nibbles << (torch.arange(8) * 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _quantization_config(plan: Mapping[str, Scheme], reader: CheckpointReader) -> dict[str, Any]:
    schemes: dict[Scheme, list[str]] = {}
    for layer, scheme in plan.items():
        schemes.setdefault(scheme, []).append(layer)
    # Every other matrix is named: what takes all linear layers for quantised would read it as integers. The head is a
    # linear layer too, whether it is tied to the embedding or not.
    others = (
        name.removesuffix(".weight")
        for name, info in sorted(reader.tensors.items())
        if len(info.shape) > 1 and name != HEAD and not is_embedding(name)
    )
    kept = [name for name in others if name not in plan and not _EXPERT.search(name)]
    ignored = ["lm_head", *kept]
    if any(_EXPERT.search(name) for name in reader.tensors):
        ignored.append(r"re:.*\.experts\..*")
    formats = {scheme.format for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{number}": scheme.config(sorted(members))
            for number, (scheme, members) in enumerate(schemes.items())
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
