"""What a LoRA adapter must be for an engine to serve it: settings it implements, and shapes that fit the base."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError
from ...agents.text_files import shown
from ..checkpoints.tensor_files import TensorInfo, read_json
from .adapter_files import CONFIG, LARGEST_VALUE, WEIGHTS, AdapterFacts, check_no_experts, linear_shape, merge_remedy
from .lora_scaling import layer_rank, layer_scaling
from .peft_kinds import REPEATED_STARTS, check_mergeable
from .target_check import checked_pattern

__all__ = ["EMBEDDINGS_SERVED", "MOST_RANK", "check_lora", "check_lora_numbers", "check_lora_settings"]

MOST_RANK = 1 << 16
"""Highest rank that a configuration may name; what a slot holds is checked against the engine's own."""

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<half>[AB])\.weight|embedding_(?P<embedded>[AB]))\Z")
EMBEDDINGS_SERVED = ("llama", "qwen3")
"""Model types whose engine takes LoRA of the embedding and of the output head (vLLM's `embedding_modules`)."""

_EMBEDDING, _HEAD = "embed_tokens", "lm_head"

# Settings that change what an adapter means and that no engine implements; `merge_adapter` can make weights of them.
_MERGEABLE = {
    "use_dora": "DoRA",
    "lora_bias": "biases in LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "modules_to_save": "whole trained modules",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on bare parameters",
    "fan_in_fan_out": "transposed layers",
    "kasa_config": "KaSA's cut base",
}


def check_lora(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    layers: dict[str, TensorInfo],
    base: Path,
) -> AdapterFacts:
    """Check settings, keys, shapes against the base's `layers`, and declared against real rank.

    Raises: AdapterError that names the setting or the layer that is wrong.
    """
    check_lora_settings(folder / CONFIG, config)
    path = folder / WEIGHTS
    modules = _pair_halves(path, tensors)
    _check_shapes(path, modules, config, layers, base)
    adapted = tuple(sorted(modules))
    return AdapterFacts(
        kind="lora",
        rank=max(a.shape[0] for a, _ in modules.values()),
        alpha=float(config["lora_alpha"]),
        modules=adapted,
        scalings=tuple(layer_scaling(config, module) for module in adapted),
        parameters=sum(math.prod(info.shape) for info in tensors.values()),
        size_bytes=path.stat().st_size,
        dtype="/".join(sorted({info.dtype for info in tensors.values()})),
    )


def check_lora_settings(path: Path, config: dict[str, Any]) -> None:
    """Check that the settings at `path` are those of a LoRA that engines serve.

    Raises: AdapterError that names the first that is not.
    """
    check_lora_numbers(path, config)
    check_mergeable(path.parent, config)
    for name, meaning in _MERGEABLE.items():
        if config.get(name):
            raise AdapterError(
                f"{path}: {name} is {shown(config[name])}",
                expected=f"an adapter without {meaning}, which the engine does not implement",
                remedy=merge_remedy(path.parent),
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{path}: bias is {shown(config['bias'])}", expected="'none'", remedy=merge_remedy(path.parent)
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() in REPEATED_STARTS:
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r}, which changes the base's own weights",
            expected="an adapter to the unchanged base",
            remedy=merge_remedy(path.parent),
        )


def check_lora_numbers(path: Path, config: dict[str, Any]) -> None:
    """Check rank, alpha and their patterns; raises AdapterError for the first that is none."""
    for name, by_layer, fits, wanted in (
        ("r", "rank_pattern", _is_rank, f"a whole number from 1 to {MOST_RANK}"),
        ("lora_alpha", "alpha_pattern", _is_alpha, f"a number from 0 to {LARGEST_VALUE:g}"),
    ):
        if not fits(config.get(name)):
            raise AdapterError(f"{path}: {name} is {shown(config.get(name))}", expected=wanted)
        values = config.get(by_layer) or {}
        if not isinstance(values, dict) or not all(map(fits, values.values())):
            raise AdapterError(f"{path}: {by_layer} is {shown(values)}", expected=f"layer → {wanted}")
        for pattern in values:
            checked_pattern(path, by_layer, pattern)
    if not isinstance(config.get("use_rslora", False), bool | None):
        raise AdapterError(f"{path}: use_rslora is {shown(config['use_rslora'])}", expected="true or false")


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MOST_RANK


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST_VALUE


def _pair_halves(path: Path, tensors: dict[str, TensorInfo]) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """A and B of each layer; those of an embedding are turned over, so that B A has the shape of its weight."""
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _KEY.match(name)
        if match is None:
            raise AdapterError(
                f"{path}: unknown key {name!r}",
                expected="base_model.model.<layer>.lora_A.weight and lora_B.weight",
                remedy=f"`metier variants add {shlex.quote(str(path.parent))} --name NAME` mends names that other "
                "tools write; else save it in the peft layout.",
            )
        if match["embedded"]:
            half = "B" if match["embedded"] == "A" else "A"
            info = replace(info, shape=info.shape[::-1])
        else:
            half = match["half"]
        halves.setdefault(match["module"], {})[half] = info
    if not halves:
        raise AdapterError(f"{path} holds no tensors", expected="lora_A and lora_B for some layers")
    for module, pair in halves.items():
        if len(pair) != 2:
            missing = "B" if "A" in pair else "A"
            raise AdapterError(
                f"{path}: {module} has no lora_{missing}", expected="both halves", remedy="Copy it again, whole."
            )
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _check_shapes(
    path: Path,
    modules: dict[str, tuple[TensorInfo, TensorInfo]],
    config: dict[str, Any],
    layers: dict[str, TensorInfo],
    base: Path,
) -> None:
    check_no_experts(path, modules, layers, base)
    for module, (a, b) in modules.items():
        d_out, d_in = _layer_shape(path, module, layers, base)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != d_in or b.shape[0] != d_out:
            raise AdapterError(
                f"{path}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}",
                expected=f"[rank, {d_in}] and [{d_out}, rank] on base {base.name}",
                remedy="Serve it on the base it was trained on, or train it again for this one.",
            )
        declared = layer_rank(config, module)
        if not a.shape[0] == b.shape[1] == declared:
            raise AdapterError(
                f"{path}: {module} has rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B",
                expected=f"the declared rank {declared}",
                remedy="Correct r in adapter_config.json, or copy the adapter again.",
            )


def _layer_shape(path: Path, module: str, layers: dict[str, TensorInfo], base: Path) -> tuple[int, int]:
    """(d_out, d_in) of a layer that engines serve a LoRA of; raises AdapterError when the base has no such layer."""
    last = module.rpartition(".")[2]
    if last not in (_EMBEDDING, _HEAD):
        return linear_shape(path, module, layers, base)
    config = read_json(base, "config.json")
    model_type = config.get("model_type")
    if model_type not in EMBEDDINGS_SERVED:
        raise AdapterError(
            f"{path}: it changes {module}, and engines of {shown(model_type)} models take no LoRA of that",
            expected=f"other layers, or a model of type {', '.join(EMBEDDINGS_SERVED)}",
            remedy=merge_remedy(path.parent),
        )
    if last == _HEAD and f"{module}.weight" not in layers and config.get("tie_word_embeddings"):
        module = next(
            (name.removesuffix(".weight") for name in layers if name.endswith(f"{_EMBEDDING}.weight")), module
        )
    found = layers.get(f"{module}.weight")
    if found is None or len(found.shape) != 2:
        return linear_shape(path, module, layers, base)
    return found.shape[0], found.shape[1]
