"""What a T-REX adapter must be for the engine's plugin to serve it: its settings, its layers' tensors, its map."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError
from ...agents.prompts import TASK_TEXT_RULE
from ...agents.text_files import shown
from ..checkpoints.tensor_files import TensorInfo, largest_value, read_values
from .adapter_files import CONFIG, LARGEST_CHANGE, PEFT_PREFIX, WEIGHTS, AdapterFacts, check_no_experts, linear_shape
from .semantic_map import CENTER_KEY, CENTROIDS_KEY
from .text_embedding import find_embedding
from .trex_shape import LAYER_PARTS, TrexShape, shape_of_block

__all__ = ["check_trex"]

_KEY = re.compile(rf"{re.escape(PEFT_PREFIX)}(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, LAYER_PARTS))})\Z")
_FLOATS = ("BF16", "F16", "F32")
# bf16 keeps a unit vector's length to a few thousandths.
_UNIT_LENGTH_TOLERANCE = 0.02


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
    path = folder / CONFIG
    shape, embed_id = shape_of_block(path, config.get("trex")), _embed_id(path, config["trex"])
    path = folder / WEIGHTS
    modules = _by_module(path, tensors)
    check_no_experts(path, modules, layers, base)
    for module, parts in modules.items():
        _check_layer(path, module, parts, shape, linear_shape(path, module, layers, base), base)
    _check_gain(path, modules, shape)
    _check_map(path, tensors, shape, embed_id)
    return AdapterFacts(
        kind="trex",
        rank=shape.rows,
        alpha=float(shape.rows),
        modules=tuple(sorted(modules)),
        scalings=(1.0,) * len(modules),
        parameters=sum(math.prod(info.shape) for parts in modules.values() for info in parts.values()),
        size_bytes=path.stat().st_size,
        dtype="/".join(sorted({parts["lora_A.weight"].dtype for parts in modules.values()})),
    )


def _embed_id(path: Path, block: dict[str, Any]) -> str:
    """Name of the embed function whose numbers the map stands on; the rule of its texts must be ours."""
    if block.get("prompt_rule") != TASK_TEXT_RULE:
        raise AdapterError(
            f"{path}: trex.prompt_rule is {shown(block.get('prompt_rule'))}",
            expected=f"{TASK_TEXT_RULE!r}, the rule by which a run's input becomes the text of its intuition here",
            remedy="Make the adapter again: with another rule its intuition would mean something else.",
        )
    embed_id = block.get("embed_id")
    if not isinstance(embed_id, str) or not embed_id:
        raise AdapterError(f"{path}: trex.embed_id is {shown(embed_id)}", expected="the name of an embed function")
    try:
        find_embedding(embed_id)
    except AdapterError as error:
        raise AdapterError(
            f"{path}: trex.embed_id: {error.problem}", expected=error.expected, remedy=error.remedy
        ) from error
    return embed_id


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
                f"{path}: unknown key {shown(name)}",
                expected=f"{PEFT_PREFIX}<layer>.{{{', '.join(LAYER_PARTS)}}}, {CENTROIDS_KEY} and {CENTER_KEY}",
                remedy="Make the adapter with `method: trex`.",
            )
        modules.setdefault(match["module"], {})[match["part"]] = info
    if not modules:
        raise AdapterError(f"{path} holds no layers", expected="T-REX tensors for some layers")
    for module, parts in modules.items():
        missing = [part for part in LAYER_PARTS if part not in parts]
        if missing:
            what = " (its router)" if missing[0] == "lora_router.weight" else ""
            raise AdapterError(
                f"{path}: {module} has no {missing[0]}{what}",
                expected=f"all of {', '.join(LAYER_PARTS)} for every layer",
                remedy="Copy the adapter again, whole.",
            )
    return modules


def _check_layer(
    path: Path, module: str, parts: dict[str, TensorInfo], shape: TrexShape, base_shape: tuple[int, int], base: Path
) -> None:
    d_out, d_in = base_shape
    for part, expected in shape.layer_shapes(d_in, d_out).items():
        found = parts[part].shape
        if found != expected:
            raise AdapterError(
                f"{path}: {module}.{part} is {list(found)}",
                expected=f"{list(expected)}, that is [{', '.join(LAYER_PARTS[part])}] with "
                f"r1={shape.r1}, r2={shape.r2} on base {base.name}",
                remedy="Serve it on the base it was trained on, or copy it again with its own adapter_config.json.",
            )


def _check_gain(path: Path, modules: dict[str, dict[str, TensorInfo]], shape: TrexShape) -> None:
    """Check what the gate at its widest makes of A and B, and the router, whose products are logits."""
    for module, parts in modules.items():
        a, b, router = (largest_value(path, parts[f"lora_{part}.weight"]) for part in ("A", "B", "router"))
        change = shape.most_gain * a * b
        if LARGEST_CHANGE < change < math.inf or LARGEST_CHANGE < router < math.inf:  # other values are named elsewhere
            raise AdapterError(
                f"{path}: {module} may add {change:.3g} to a weight (gate up to {shape.most_gain:.3g}, A {a:.3g}, "
                f"B {b:.3g}), and its router holds {router:.3g}",
                expected=f"at most {LARGEST_CHANGE:g} of both, so that its numbers do not overflow in an engine",
                remedy="Its training diverged, or k_tok or k_task is wrong: make it again.",
            )


def _check_map(path: Path, tensors: dict[str, TensorInfo], shape: TrexShape, embed_id: str) -> None:
    e = find_embedding(embed_id)([""]).shape[1]
    wanted = {CENTROIDS_KEY: ((shape.experts, e), "[r1·r2, e]"), CENTER_KEY: ((e,), "[e]")}
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
                expected=f"{list(expected)}, that is {meaning} with the {e} numbers of {embed_id!r}",
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
