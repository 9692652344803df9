"""What every check of an adapter folder starts from: its config, its tensors, and what it claims to adapt."""

from __future__ import annotations

import math
import shlex
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError
from ...agents.text_files import UnreadableTextError, parse_json, read_bounded, shown
from ..checkpoints.expert_layers import first_in_mixture
from ..checkpoints.tensor_files import FLOATS, CorruptFileError, TensorInfo, largest_value, read_header
from ..shelf.adapter_kinds import AdapterName

__all__ = [
    "CONFIG",
    "LARGEST_CHANGE",
    "LARGEST_VALUE",
    "MOST_CONFIG_MIB",
    "PEFT_PREFIX",
    "WEIGHTS",
    "AdapterFacts",
    "check_finite",
    "check_no_experts",
    "check_values",
    "half_names",
    "linear_shape",
    "merge_remedy",
    "read_config",
    "read_tensors",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""What peft puts before a module's own name in the keys of an adapter."""

MOST_CONFIG_MIB = 4
"""Largest configuration read, in MiB."""

LARGEST_VALUE = 65_504.0
"""Largest magnitude of a served weight: float16's largest number, the narrowest type that an engine computes in."""

LARGEST_CHANGE = 10_000.0
"""Largest number that an adapter may add to a weight of the base, those being around 1; above it, activations of an
ordinary size overflow some layers later."""


@dataclass(frozen=True)
class AdapterFacts:
    """What a checked adapter is.

    `rank` is how many rows of a slot it needs: a LoRA's real, largest rank; r1 + r1·r2 of a T-REX adapter, whose
    router rides in the slot. `scalings` has what multiplies B A x in each of `modules` (T-REX has none, so 1).
    """

    kind: AdapterName
    rank: int
    alpha: float
    modules: tuple[str, ...]
    scalings: tuple[float, ...]
    parameters: int
    size_bytes: int
    dtype: str

    @property
    def scaling(self) -> float:
        """The largest of the layers' scalings; with most adapters they are all the same."""
        return max(self.scalings)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`; raises AdapterError when it is missing or no JSON object."""
    path = folder / CONFIG
    try:
        config = parse_json(read_bounded(path, most_mib=MOST_CONFIG_MIB))
    except OSError as error:
        raise AdapterError(
            f"adapter {folder} lacks {CONFIG}", expected="the peft layout", remedy="Copy it again, whole."
        ) from error
    except UnreadableTextError as error:
        raise AdapterError(f"{path} cannot be read: {error}", expected=f"peft's {CONFIG}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds {type(config).__name__}", expected="a JSON object, as peft writes it")
    return config


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Types, shapes and places of an adapter's tensors; raises AdapterError when there is no whole file of them."""
    path = folder / WEIGHTS
    try:
        return read_header(path)
    except FileNotFoundError as error:
        pickled = (folder / "adapter_model.bin").exists()
        raise AdapterError(
            f"adapter {folder} lacks {WEIGHTS}",
            expected="weights in safetensors" + (", not a pickle" if pickled else ""),
            remedy="Save it again with safe_serialization=True." if pickled else "Copy the folder again, whole.",
        ) from error
    except (CorruptFileError, OSError) as error:
        raise AdapterError(
            f"{path} is damaged: {error}",
            expected="a whole safetensors file",
            remedy="Copy the adapter again, or make it again from its recipe.",
        ) from error


def check_finite(path: Path, tensors: dict[str, TensorInfo]) -> dict[str, float]:
    """Largest magnitude of each tensor; raises AdapterError that names the first with a value not finite."""
    largest = {name: largest_value(path, info) for name, info in tensors.items()}
    for name, value in largest.items():
        if not math.isfinite(value):
            raise AdapterError(
                f"{path}: {name} holds values that are not finite",
                expected="finite numbers",
                remedy="Its training diverged: make it again with a lower learning_rate.",
            )
    return largest


def check_values(path: Path, tensors: dict[str, TensorInfo], facts: AdapterFacts) -> None:
    """Check that every value is a finite number that can be served, and so is what each layer adds to the base.

    Raises: AdapterError that names the first tensor or layer that is wrong.
    """
    for name, info in tensors.items():
        if info.dtype not in FLOATS:
            raise AdapterError(f"{path}: {shown(name)} is {info.dtype}", expected=f"one of {', '.join(FLOATS)}")
    largest = check_finite(path, tensors)
    remedy = "Its training diverged, or its alpha is wrong: make it again."
    for name, value in largest.items():
        if value > LARGEST_VALUE:
            problem = f"{path}: {name} holds a value of magnitude {value:.3g}"
            raise AdapterError(
                problem, expected=f"at most {LARGEST_VALUE:g}, so that engines can hold it", remedy=remedy
            )
    for module, scaling in zip(facts.modules, facts.scalings, strict=True):
        a, b = (largest[name] for name in half_names(module, largest))
        change = scaling * a * b * facts.rank
        if not change <= LARGEST_CHANGE or not scaling * b <= LARGEST_VALUE:
            raise AdapterError(
                f"{path}: {module} may add {change:.3g} to a weight (scaling {scaling:.3g}, A up to {a:.3g}, "
                f"B up to {b:.3g})",
                expected=f"at most {LARGEST_CHANGE:g}, so that its numbers do not overflow in an engine",
                remedy=remedy,
            )


def half_names(module: str, tensors: Container[str]) -> tuple[str, str]:
    """Names of a layer's two halves among an adapter's `tensors`; peft names those of an embedding otherwise."""
    key = f"{PEFT_PREFIX}{module}.lora_"
    if f"{key}embedding_A" in tensors:
        return f"{key}embedding_A", f"{key}embedding_B"
    return f"{key}A.weight", f"{key}B.weight"


def check_no_experts(path: Path, modules: Iterable[str], layers: dict[str, TensorInfo], base: Path) -> None:
    """Raise AdapterError when one of the adapted `modules` is an expert of the base, or the router beside them."""
    module = first_in_mixture(modules, layers)
    if module is not None:
        raise AdapterError(
            f"{path}: {module} is an expert of base {base.name}, or chooses among them",
            expected="adapters of attention: engines here serve no others on a mixture of experts",
            remedy="Train it again with target_modules of attention only: q_proj, k_proj, v_proj, o_proj.",
        )


def linear_shape(path: Path, module: str, layers: dict[str, TensorInfo], base: Path) -> tuple[int, int]:
    """(d_out, d_in) of a base's linear layer; raises AdapterError when the base has no such layer."""
    layer = layers.get(f"{module}.weight")
    if layer is None or len(layer.shape) != 2 or "embed" in module.rpartition(".")[2]:
        raise AdapterError(
            f"{path}: {module} is no linear layer of base {base.name}",
            expected="layers that the base has",
            remedy="Serve it on the base it was trained on, or train it again for this one.",
        )
    return layer.shape[0], layer.shape[1]


def merge_remedy(folder: Path) -> str:
    """What to do with an adapter that no engine can load, but that fixed weights can take in."""
    merge = f"metier variants merge {shlex.quote(str(folder))} --name NAME"
    return f"`{merge}`, with the same --base, makes a checkpoint of its own of it."
