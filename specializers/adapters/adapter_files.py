"""What every check of an adapter folder starts from: its config, its tensors, and what it claims to adapt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError
from ..checkpoints.tensor_files import CorruptFileError, TensorInfo, is_finite, read_header
from ..shelf.adapter_kinds import AdapterName

__all__ = [
    "CONFIG",
    "PEFT_PREFIX",
    "WEIGHTS",
    "AdapterFacts",
    "check_finite",
    "linear_shape",
    "read_config",
    "read_tensors",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""What peft puts before a module's own name in the keys of an adapter."""


@dataclass(frozen=True)
class AdapterFacts:
    """What a checked adapter is.

    `rank` is how many rows of a slot it needs: a LoRA's real, largest rank; r1 + r1·r2 of a T-REX adapter, whose
    router rides in the slot. `scaling` multiplies B A x (T-REX has none, so 1).
    """

    kind: AdapterName
    rank: int
    alpha: float
    scaling: float
    modules: tuple[str, ...]
    parameters: int
    size_bytes: int
    dtype: str


def read_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`; raises AdapterError when it is missing or no JSON object."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            f"adapter {folder} lacks {CONFIG}", expected="the peft layout", remedy="Copy it again, whole."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}", expected=f"peft's {CONFIG}") from error
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


def check_finite(path: Path, tensors: dict[str, TensorInfo]) -> None:
    """Check every value of every tensor; raises AdapterError that names the first tensor with one not finite."""
    for name, info in tensors.items():
        if not is_finite(path, info):
            raise AdapterError(
                f"{path}: {name} holds values that are not finite",
                expected="finite numbers",
                remedy="Its training diverged: make it again with a lower learning_rate.",
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
