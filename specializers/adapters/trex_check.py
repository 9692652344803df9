"""What a T-REX adapter must be for the engine's plugin to serve it: its settings, its router and gate, its map.

The layout: per layer lora_A [r1, d_in], lora_B [d_out, r2],
lora_router [r1·r2, d_in], trex_omega [1] and trex_gamma [1]; once, trex_centroids [r1·r2, e] and trex_center [e].
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError
from ...agents.prompts import TASK_TEXT_RULE
from ..checkpoints.tensor_files import TensorInfo, read_values
from .adapter_files import CONFIG, PEFT_PREFIX, WEIGHTS, AdapterFacts, linear_shape
from .semantic_map import CENTER_KEY, CENTROIDS_KEY
from .text_embedding import find_embedding

__all__ = ["TREX_FORMAT", "check_trex"]

TREX_FORMAT = 1
"""The version of the layout that this code reads."""

_PARTS = ("lora_A.weight", "lora_B.weight", "lora_router.weight", "trex_omega", "trex_gamma")
_KEY = re.compile(
    rf"{re.escape(PEFT_PREFIX)}(?P<module>.+)\.(?P<part>{'|'.join(re.escape(part) for part in _PARTS)})\Z"
)
_FLOATS = ("BF16", "F16", "F32")
# bf16 keeps a unit vector's length to a few thousandths.
_UNIT_LENGTH_TOLERANCE = 0.02


@dataclass(frozen=True)
class _TrexBlock:
    r1: int
    r2: int
    k_tok: float
    k_task: float
    embed_id: str

    @property
    def experts(self) -> int:
        return self.r1 * self.r2

    @property
    def rows(self) -> int:
        return self.r1 + self.experts


def check_trex(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    layers: dict[str, TensorInfo],
    base: Path,
) -> AdapterFacts:
    """Check the `trex` block, every layer's five tensors against the base's `layers`, and the semantic map.

    Raises: AdapterError that names the setting, the key or the shape that is wrong.
    """
    block = _read_block(folder / CONFIG, config)
    path = folder / WEIGHTS
    modules = _by_module(path, tensors)
    for module, parts in modules.items():
        _check_layer(path, module, parts, block, linear_shape(path, module, layers, base), base)
    _check_map(path, tensors, block)
    return AdapterFacts(
        kind="trex",
        rank=block.rows,
        alpha=float(block.rows),
        scaling=1.0,
        modules=tuple(sorted(modules)),
        parameters=sum(math.prod(info.shape) for parts in modules.values() for info in parts.values()),
        size_bytes=path.stat().st_size,
        dtype="/".join(sorted({parts["lora_A.weight"].dtype for parts in modules.values()})),
    )


def _read_block(path: Path, config: dict[str, Any]) -> _TrexBlock:
    block = config.get("trex")
    if not isinstance(block, dict):
        raise AdapterError(
            f"{path}: trex is {block!r}",
            expected="a block with format, r1, r2, k_tok, k_task, embed_id and prompt_rule",
            remedy="Make the adapter with `method: trex`, or copy its folder again.",
        )
    if block.get("format") != TREX_FORMAT:
        raise AdapterError(
            f"{path}: trex.format is {block.get('format')!r}",
            expected=f"{TREX_FORMAT}, the layout this version reads",
            remedy="Serve it with the version of metier that made it, or make it again.",
        )
    for name, lowest in (("r1", 1), ("r2", 1)):
        value = block.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise AdapterError(f"{path}: trex.{name} is {value!r}", expected=f"a whole number of at least {lowest}")
    for name in ("k_tok", "k_task"):
        value = block.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise AdapterError(f"{path}: trex.{name} is {value!r}", expected="a number of at least 0")
    if block.get("prompt_rule") != TASK_TEXT_RULE:
        raise AdapterError(
            f"{path}: trex.prompt_rule is {block.get('prompt_rule')!r}",
            expected=f"{TASK_TEXT_RULE!r}, the rule by which a run's input becomes the text of its intuition here",
            remedy="Make the adapter again: with another rule its intuition would mean something else.",
        )
    embed_id = block.get("embed_id")
    if not isinstance(embed_id, str) or not embed_id:
        raise AdapterError(f"{path}: trex.embed_id is {embed_id!r}", expected="the name of an embed function")
    return _TrexBlock(block["r1"], block["r2"], float(block["k_tok"]), float(block["k_task"]), embed_id)


def _by_module(path: Path, tensors: dict[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if info.dtype not in _FLOATS:
            raise AdapterError(f"{path}: {name} is {info.dtype}", expected=f"one of {', '.join(_FLOATS)}")
        if name in (CENTROIDS_KEY, CENTER_KEY):
            continue
        match = _KEY.match(name)
        if match is None:
            raise AdapterError(
                f"{path}: unknown key {name!r}",
                expected=f"{PEFT_PREFIX}<layer>.{{{', '.join(_PARTS)}}}, {CENTROIDS_KEY} and {CENTER_KEY}",
                remedy="Make the adapter with `method: trex`.",
            )
        modules.setdefault(match["module"], {})[match["part"]] = info
    if not modules:
        raise AdapterError(f"{path} holds no layers", expected="T-REX tensors for some layers")
    for module, parts in modules.items():
        missing = [part for part in _PARTS if part not in parts]
        if missing:
            what = " (its router)" if missing[0] == "lora_router.weight" else ""
            raise AdapterError(
                f"{path}: {module} has no {missing[0]}{what}",
                expected=f"all of {', '.join(_PARTS)} for every layer",
                remedy="Copy the adapter again, whole.",
            )
    return modules


def _check_layer(
    path: Path, module: str, parts: dict[str, TensorInfo], block: _TrexBlock, shape: tuple[int, int], base: Path
) -> None:
    d_out, d_in = shape
    r1, r2, experts = block.r1, block.r2, block.experts
    wanted = {
        "lora_A.weight": ((r1, d_in), "[r1, d_in]"),
        "lora_B.weight": ((d_out, r2), "[d_out, r2]"),
        "lora_router.weight": ((experts, d_in), "[r1·r2, d_in]"),
        "trex_omega": ((1,), "[1]"),
        "trex_gamma": ((1,), "[1]"),
    }
    for part, (expected, meaning) in wanted.items():
        found = parts[part].shape
        if found != expected:
            raise AdapterError(
                f"{path}: {module}.{part} is {list(found)}",
                expected=f"{list(expected)}, that is {meaning} with r1={r1}, r2={r2} on base {base.name}",
                remedy="Serve it on the base it was trained on, or copy it again with its own adapter_config.json.",
            )


def _check_map(path: Path, tensors: dict[str, TensorInfo], block: _TrexBlock) -> None:
    e = find_embedding(block.embed_id)([""]).shape[1]
    wanted = {CENTROIDS_KEY: ((block.experts, e), "[r1·r2, e]"), CENTER_KEY: ((e,), "[e]")}
    for name, (expected, meaning) in wanted.items():
        info = tensors.get(name)
        if info is None:
            raise AdapterError(
                f"{path} has no {name}",
                expected=f"the semantic map that gives a run's intuition: {CENTROIDS_KEY} and {CENTER_KEY}",
                remedy="Copy the adapter again, whole.",
            )
        if info.shape != expected:
            raise AdapterError(
                f"{path}: {name} is {list(info.shape)}",
                expected=f"{list(expected)}, that is {meaning} with the {e} numbers of {block.embed_id!r}",
                remedy="These are centroids of another embed function or another r1·r2: copy the adapter again.",
            )
    import numpy

    with numpy.errstate(all="ignore"):  # values that are not finite are named by a check of their own
        lengths = numpy.linalg.norm(read_values(path, tensors[CENTROIDS_KEY]), axis=1)
        wrong = numpy.flatnonzero(numpy.abs(lengths - 1.0) > _UNIT_LENGTH_TOLERANCE)
    if wrong.size and numpy.isfinite(lengths).all():
        raise AdapterError(
            f"{path}: row {wrong[0]} of {CENTROIDS_KEY} has length {lengths[wrong[0]]:.3g}",
            expected="centroids of length 1, so that intuitions are cosines",
            remedy="Make the adapter again with this version.",
        )
