"""Checkpoints as other tools quantise them: each kind's tensors and config, and the dense weights they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "write_quantised"]

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _weights(kind: str, strategy: str, bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


_INT8_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_FP8_TOKEN = {**_INT8_TOKEN, "type": "float"}

# compressed-tensors: format, weights, inputs.
_COMPRESSED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int8-channel": ("int-quantized", _weights("int", "channel", 8), _INT8_TOKEN),
    "int8-tensor": ("int-quantized", _weights("int", "tensor", 8), _INT8_TOKEN),
    "int8-asymmetric-inputs": ("int-quantized", _weights("int", "channel", 8), {**_INT8_TOKEN, "symmetric": False}),
    "int4-channel": ("pack-quantized", _weights("int", "channel", 4), None),
    "int4-group": ("pack-quantized", _weights("int", "group", 4, group_size=GROUP), None),
    "int4-asymmetric": ("pack-quantized", _weights("int", "group", 4, group_size=GROUP, symmetric=False), None),
    "fp8-channel": ("float-quantized", _weights("float", "channel", 8), _FP8_TOKEN),
    "fp8-tensor": ("float-quantized", _weights("float", "tensor", 8), _FP8_TOKEN),
}
KINDS = (*_COMPRESSED, "fp8", "gptq", "awq")
"""What `write_quantised` writes."""


def write_quantised(base: Path, target: Path, kind: str) -> dict[str, Any]:
    """Write the linear layers of `base` quantised as `kind`; returns the dense weight of each by its name."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, target)
    tensors = load_file(base / "model.safetensors")
    dense: dict[str, Any] = {}
    for name in sorted(tensors):
        if not name.endswith("_proj.weight"):
            continue
        layer = name.removesuffix(".weight")
        parts, dense[layer] = _STORE.get(kind, _compressed)(tensors.pop(name).float(), kind)
        tensors |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = _config(kind)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return dense


def _config(kind: str) -> dict[str, Any]:
    if kind == "fp8":
        return {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if kind == "gptq":
        settings = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
        return {"quant_method": "gptq", **settings}
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    form, weights, inputs = _COMPRESSED[kind]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _compressed(weight: Any, kind: str) -> tuple[dict[str, Any], Any]:
    """By the format's own library."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    form, weights, inputs = _COMPRESSED[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=form)
    groups = {"tensor": weight.view(1, -1), "channel": weight}.get(
        weights["strategy"], weight.unflatten(1, (-1, GROUP))
    )
    low, high = groups.amin(-1), groups.amax(-1)
    if weights["strategy"] != "group":
        low, high = low.view(-1, 1), high.view(-1, 1)
    scale, zero = calculate_qparams(low, high, scheme.weights)
    if weights["strategy"] == "tensor":
        scale, zero = scale.view(1), zero.view(1)
    state: dict[str, Any] = {"weight": weight, "weight_scale": scale.to(torch.bfloat16).float()}
    if not weights["symmetric"]:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.load_from_registry(form)
    parts = compressor.compress(state, scheme)
    dense = compressor.decompress(dict(parts), scheme)["weight"]
    parts["weight_scale"] = parts["weight_scale"].to(torch.bfloat16)
    return parts, dense


def _fp8(weight: Any, _kind: str) -> tuple[dict[str, Any], Any]:
    import torch

    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale.view(1)}, stored.float() * scale


def _integers(weight: Any) -> tuple[Any, Any, Any]:
    """Values 0…15 [inputs, rows], zeros [groups, rows] and scales [groups, rows]."""
    import torch

    by_input = weight.T.unflatten(0, (-1, GROUP))  # [groups, inputs of one, rows]
    low, high = by_input.amin(1), by_input.amax(1)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    values = (by_input / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return values.flatten(0, 1).to(torch.int64), zeros.to(torch.int64), scales


def _packed(columns: list[Any]) -> Any:
    """Eight tensors of nibbles as one of int32 words, the first lowest."""
    import torch

    words = sum(nibbles << (4 * place) for place, nibbles in enumerate(columns))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _dense(values: Any, zeros: Any, scales: Any) -> Any:
    return ((values - zeros.repeat_interleave(GROUP, 0)) * scales.repeat_interleave(GROUP, 0)).T.contiguous()


def _gptq(weight: Any, _kind: str) -> tuple[dict[str, Any], Any]:
    import torch

    values, zeros, scales = _integers(weight)
    zeros = torch.full_like(zeros, 8)  # symmetric
    by_group = weight.T.unflatten(0, (-1, GROUP))
    scales = (by_group.abs().amax(1) / 7).half().float()
    values = (by_group / scales[:, None] + 8).round().clamp(0, 15).flatten(0, 1).to(torch.int64)
    stored_zeros = (zeros - 1) & 15
    parts = {
        "qweight": _packed([values[place::8] for place in range(8)]),
        "qzeros": _packed([stored_zeros[:, place::8] for place in range(8)]),
        "scales": scales.half(),
        "g_idx": torch.arange(len(values), dtype=torch.int32) // GROUP,
    }
    return parts, _dense(values, zeros, scales)


def _awq(weight: Any, _kind: str) -> tuple[dict[str, Any], Any]:
    values, zeros, scales = _integers(weight)
    parts = {
        "qweight": _packed([values[:, place::8] for place in AWQ_ORDER]),
        "qzeros": _packed([zeros[:, place::8] for place in AWQ_ORDER]),
        "scales": scales.half(),
    }
    return parts, _dense(values, zeros, scales)


_STORE: dict[str, Callable[[Any, str], tuple[dict[str, Any], Any]]] = {"fp8": _fp8, "gptq": _gptq, "awq": _awq}
