"""What a LoRA adapter must be for an engine to serve it: settings it implements, and shapes that fit the base."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError
from ...agents.text_files import shown
from ..checkpoints.tensor_files import TensorInfo
from .adapter_files import CONFIG, WEIGHTS, AdapterFacts, linear_shape
from .target_check import checked_pattern

__all__ = ["check_lora"]

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight\Z")

# Settings that change what an adapter means and that the engine does not implement.
_MUST_BE_UNSET = {
    "use_dora": "DoRA",
    "lora_bias": "biases in LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "modules_to_save": "whole trained modules",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on bare parameters",
    "fan_in_fan_out": "transposed layers",
}
# These change the base's own weights when training starts, so the adapter alone is not what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


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
    _check_settings(folder / CONFIG, config)
    path = folder / WEIGHTS
    modules = _pair_halves(path, tensors)
    _check_shapes(path, modules, config, layers, base)
    alpha = float(config["lora_alpha"])
    declared = int(config["r"])
    return AdapterFacts(
        kind="lora",
        rank=max(a.shape[0] for a, _ in modules.values()),
        alpha=alpha,
        scaling=alpha / (math.sqrt(declared) if config.get("use_rslora") else declared),
        modules=tuple(sorted(modules)),
        parameters=sum(math.prod(info.shape) for info in tensors.values()),
        size_bytes=path.stat().st_size,
        dtype="/".join(sorted({info.dtype for info in tensors.values()})),
    )


def _check_settings(path: Path, config: dict[str, Any]) -> None:
    for name, type_, lowest in (("r", int, 1), ("lora_alpha", int | float, 0)):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, type_) or not lowest <= value < math.inf:
            raise AdapterError(f"{path}: {name} is {value!r}", expected=f"a number of at least {lowest}")
    ranks = config.get("rank_pattern") or {}
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank >= 1 for rank in ranks.values()):
        raise AdapterError(f"{path}: rank_pattern is {shown(ranks)}", expected="layer → rank of at least 1")
    for pattern in ranks:
        checked_pattern(path, "rank_pattern", pattern)
    for name, meaning in _MUST_BE_UNSET.items():
        if config.get(name):
            raise AdapterError(
                f"{path}: {name} is {shown(config[name])}",
                expected=f"an adapter without {meaning}, which the engine does not implement",
                remedy="Train it as plain LoRA, or merge it into a checkpoint of its own.",
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {shown(config['bias'])}", expected="'none'")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r}, which changes the base's own weights",
            expected="an adapter to the unchanged base",
            remedy="Convert it with peft's path_initial_model_for_weight_conversion.",
        )


def _pair_halves(path: Path, tensors: dict[str, TensorInfo]) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _KEY.match(name)
        if match is None:
            raise AdapterError(
                f"{path}: unknown key {name!r}",
                expected="base_model.model.<layer>.lora_A.weight and lora_B.weight",
                remedy="Save it in the peft layout.",
            )
        halves.setdefault(match["module"], {})[match["half"]] = info
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
    for module, (a, b) in modules.items():
        d_out, d_in = linear_shape(path, module, layers, base)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != d_in or b.shape[0] != d_out:
            raise AdapterError(
                f"{path}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}",
                expected=f"[rank, {d_in}] and [{d_out}, rank] on base {base.name}",
                remedy="Serve it on the base it was trained on, or train it again for this one.",
            )
        declared = _declared_rank(config, module)
        if not a.shape[0] == b.shape[1] == declared:
            raise AdapterError(
                f"{path}: {module} has rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B",
                expected=f"the declared rank {declared}",
                remedy="Correct r in adapter_config.json, or copy the adapter again.",
            )


def _declared_rank(config: dict[str, Any], module: str) -> int:
    # peft's own rule: a pattern matches the end of the module name, from a dot on; the first match wins.
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return int(rank)
    return int(config["r"])
