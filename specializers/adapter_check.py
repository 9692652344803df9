"""Checks of an adapter folder before an engine sees it: engines accept some wrong ones and die on others."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..agents.errors import AdapterError
from ..agents.prompts import PROMPT_LAYOUT
from .base_model import base_fingerprint, base_tensors
from .tensor_files import CorruptFileError, TensorInfo, is_finite, read_header
from .variant import Variant

__all__ = ["AdapterFacts", "check_adapter", "check_variant"]

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


@dataclass(frozen=True)
class AdapterFacts:
    """What a checked adapter is: `rank` is its real, largest rank; `scaling` multiplies B A x."""

    rank: int
    alpha: float
    scaling: float
    modules: tuple[str, ...]
    parameters: int
    size_bytes: int
    dtype: str


def check_adapter(folder: Path, base: Path, *, slot_rank: int) -> AdapterFacts:
    """Check a LoRA adapter folder (peft layout) against the base it is to be served on.

    All of it is read: file, keys, shapes against the base's own layers, declared against real rank, rank against
    the engine's `slot_rank`, and that every value is finite. Takes milliseconds and needs no torch.
    Raises: AdapterError that names the file, key or value that is wrong.
    """
    config = _read_config(folder)
    path = folder / "adapter_model.safetensors"
    try:
        tensors = read_header(path)
    except FileNotFoundError as error:
        pickled = (folder / "adapter_model.bin").exists()
        raise AdapterError(
            f"adapter {folder} lacks adapter_model.safetensors",
            expected="weights in safetensors" + (", not a pickle" if pickled else ""),
            remedy="Save it again with safe_serialization=True." if pickled else "Copy the folder again, whole.",
        ) from error
    except (CorruptFileError, OSError) as error:
        raise AdapterError(
            f"{path} is damaged: {error}",
            expected="a whole safetensors file",
            remedy="Copy the adapter again, or make it again from its recipe.",
        ) from error
    modules = _pair_halves(path, tensors)
    _check_shapes(path, modules, config, base_tensors(base), base)
    rank = max(a.shape[0] for a, _ in modules.values())
    if rank > slot_rank:
        raise AdapterError(
            f"adapter {folder} has rank {rank}",
            expected=f"at most the engine's slot_rank={slot_rank}",
            remedy=f"Start the engine with slot_rank={rank}, or make the adapter with a lower rank.",
        )
    for name, info in tensors.items():
        if not is_finite(path, info):
            raise AdapterError(
                f"{path}: {name} holds values that are not finite",
                expected="finite numbers",
                remedy="Its training diverged: make it again with a lower learning_rate.",
            )
    alpha = float(config["lora_alpha"])
    declared = int(config["r"])
    return AdapterFacts(
        rank=rank,
        alpha=alpha,
        scaling=alpha / (math.sqrt(declared) if config.get("use_rslora") else declared),
        modules=tuple(sorted(modules)),
        parameters=sum(math.prod(info.shape) for info in tensors.values()),
        size_bytes=path.stat().st_size,
        dtype="/".join(sorted({info.dtype for info in tensors.values()})),
    )


def check_variant(variant: Variant, folder: Path, base: Path, *, slot_rank: int) -> AdapterFacts | None:
    """Check that a variant can be served on this base: its base, its prompt layout, and its adapter if any.

    Raises: AdapterError for the first thing that does not fit.
    """
    found = base_fingerprint(base)
    if variant.base != found:
        raise AdapterError(
            f"variant {variant.name!r} was made for base {variant.base}",
            expected=f"the base in use, {found} ({base.name})",
            remedy="Open the session on the variant's own base, or make the variant again for this one.",
        )
    if variant.prompt_layout != PROMPT_LAYOUT:
        raise AdapterError(
            f"variant {variant.name!r} was trained with prompt layout {variant.prompt_layout}",
            expected=f"layout {PROMPT_LAYOUT}",
            remedy="Make it again from its recipe: at another layout its quality is unknown.",
        )
    if variant.ask.adapter is None:
        return None
    facts = check_adapter(folder / "adapter", base, slot_rank=slot_rank)
    if facts.rank != variant.ask.rank:
        raise AdapterError(
            f"variant {variant.name!r} is recorded with rank {variant.ask.rank}",
            expected=f"rank {facts.rank}, as its adapter has",
            remedy="Its folder was changed: copy it again, or make it again.",
        )
    return facts


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            f"adapter {folder} lacks adapter_config.json", expected="the peft layout", remedy="Copy it again, whole."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}", expected="peft's adapter_config.json") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(
            f"{path}: peft_type is {kind!r}",
            expected="'LORA'",
            remedy="Convert it with peft.save_as_lora, where peft can.",
        )
    for name, type_, lowest in (("r", int, 1), ("lora_alpha", int | float, 0)):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, type_) or not lowest <= value < math.inf:
            raise AdapterError(f"{path}: {name} is {value!r}", expected=f"a number of at least {lowest}")
    for name, meaning in _MUST_BE_UNSET.items():
        if config.get(name):
            raise AdapterError(
                f"{path}: {name} is {config[name]!r}",
                expected=f"an adapter without {meaning}, which the engine does not implement",
                remedy="Train it as plain LoRA, or merge it into a checkpoint of its own.",
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {config['bias']!r}", expected="'none'")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r}, which changes the base's own weights",
            expected="an adapter to the unchanged base",
            remedy="Convert it with peft's path_initial_model_for_weight_conversion.",
        )
    return config


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
        layer = layers.get(f"{module}.weight")
        if layer is None or len(layer.shape) != 2 or "embed" in module.rpartition(".")[2]:
            raise AdapterError(
                f"{path}: {module} is no linear layer of base {base.name}",
                expected="layers that the base has",
                remedy="Serve it on the base it was trained on, or train it again for this one.",
            )
        d_out, d_in = layer.shape
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
