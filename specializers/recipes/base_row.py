"""What can be made of a base model: each method asked with small settings, before anything long starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.errors import MetierError
from ..checkpoints.tensor_files import read_json
from ..methods.method import METHODS, Job, find_method

__all__ = ["Capability", "base_row"]


@dataclass(frozen=True)
class Capability:
    """One method on one base; `refused` is empty where the method takes the base, else says why not."""

    method: str
    refused: str = ""
    remedy: str = ""


def base_row(base: Path) -> Iterator[Capability]:
    """Ask every method that makes weights, adapters or attention whether it takes the checkpoint in `base`.

    Takes milliseconds for most, and makes nothing. Raises: BaseModelError for a folder that holds no checkpoint.
    """
    config = read_json(base, "config.json")
    job = Job(
        model=base,
        base_name=base.name,
        adapter=None,
        rows=(),
        seed=0,
        out=base / "none",
        work_dir=base / "none",
        fingerprint="",
    )
    for name in METHODS:
        given = _SMALL.get(name)
        if given is None:
            continue
        method = find_method(name)
        try:
            if method.check is not None:
                method.check(method.settings.model_validate({"method": name, **given(config)}), job)
        except MetierError as error:
            yield Capability(name, error.problem, error.remedy)
        else:
            yield Capability(name)


def _half(config: dict[str, Any], name: str, step: int) -> int:
    """About half of a size that the config names, as a multiple of `step`; `step` itself where it names none."""
    return max(int(config.get(name) or 0) // 2 // step, 1) * step


# Settings that fit every size of model: what a method refuses then is the kind of model.
_SMALL: dict[str, Any] = {
    "lora": lambda config: {},
    "trex": lambda config: {},
    "width_pruning": lambda config: {"intermediate_size": _half(config, "intermediate_size", 16)},
    "depth_pruning": lambda config: {"layers": 1},
    "pat": lambda config: {
        "hidden_size": _half(config, "hidden_size", math.lcm(16, int(config.get("num_attention_heads") or 1)))
    },
    "ptq": lambda config: {"scheme": "w8a8"},
    "msq": lambda config: {"target_bits": 4.0},
    "npft": lambda config: {},
    "fier": lambda config: {"budget_tokens": 32},
}
