"""Whether an adapter's file holds the layers that its config says it adapts, no more and no fewer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError
from ...agents.text_files import shown
from ..checkpoints.tensor_files import TensorInfo

__all__ = ["MOST_OPEN_REPEATS", "MOST_PATTERN_CHARACTERS", "check_targets", "checked_pattern"]

MOST_PATTERN_CHARACTERS = 2000
"""Longest pattern of module names."""

MOST_OPEN_REPEATS = 4
"""Repeats without an end (`*`, `+`, `{2,}`) in a pattern: what matching may take grows with a power of them."""

_OPEN_REPEAT = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\})")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{\d*,)")


def check_targets(path: Path, config: dict[str, Any], modules: Collection[str], layers: dict[str, TensorInfo]) -> None:
    """Compare `target_modules` of the config at `path` with the file's `modules` on the base's `layers`.

    Layers that a pattern or list leaves to the file alone are not missed: excluded ones, those of chosen depths,
    experts (which checkpoints name otherwise than models do), and with `all-linear` any.
    Raises: AdapterError that names the first layer that is too many or missing.
    """
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    fits = _matcher(path, targets)
    extra = sorted(module for module in modules if not fits(module))
    if extra:
        raise AdapterError(
            f"{path}: its weights adapt {extra[0]}, which is not among target_modules {shown(targets)}",
            expected="weights of the layers that the config names",
            remedy="Copy the adapter again, with its own adapter_config.json.",
        )
    if any(config.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return
    linear = (name.removesuffix(".weight") for name, info in layers.items() if len(info.shape) == 2)
    there = (name for name in linear if "embed" not in name.rpartition(".")[2] and ".experts." not in name)
    missing = sorted(name for name in there if f"{name}.weight" in layers and fits(name) and name not in modules)
    if missing:
        raise AdapterError(
            f"{path}: target_modules {shown(targets)} names {missing[0]}, which the weights lack",
            expected="weights for every layer that the config names",
            remedy="Copy the adapter again, whole.",
        )


def checked_pattern(path: Path, name: str, pattern: object) -> str:
    """A pattern of module names that is one and whose matching ends soon; raises AdapterError for others."""
    if not isinstance(pattern, str) or len(pattern) > MOST_PATTERN_CHARACTERS:
        problem = f"{path}: {name} has the pattern {shown(pattern)}"
        raise AdapterError(problem, expected=f"a text of at most {MOST_PATTERN_CHARACTERS} characters")
    if len(_OPEN_REPEAT.findall(pattern)) > MOST_OPEN_REPEATS or _REPEATED_GROUP.search(pattern):
        raise AdapterError(
            f"{path}: {name} has the pattern {shown(pattern)}, which may take for ever to match",
            expected=f"at most {MOST_OPEN_REPEATS} open repeats, none of a group",
            remedy="List the layers by name.",
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{path}: {name} has the pattern {shown(pattern)}: {error}", expected="a pattern") from error
    return pattern


def _matcher(path: Path, targets: object) -> Callable[[str], bool]:
    # peft's own rule: a text is a pattern of the whole name, a list holds names or their ends from a dot on.
    if isinstance(targets, str):
        pattern = re.compile(checked_pattern(path, "target_modules", targets))
        return lambda module: pattern.fullmatch(module) is not None
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        named = tuple(f".{target}" for target in targets)
        return lambda module: f".{module}".endswith(named)
    problem = f"{path}: target_modules is {shown(targets)}"
    raise AdapterError(problem, expected="a list of layers' names, or a pattern")
