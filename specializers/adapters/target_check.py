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
_ANY_DEPTH = re.compile(r".*?\.[^.]*\.(\d+)\.")  # the first number in a name, as peft finds it
_REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{\d*,)")


def check_targets(path: Path, config: dict[str, Any], modules: Collection[str], layers: dict[str, TensorInfo]) -> None:
    """Compare the layers that the config at `path` names with the file's `modules` on the base's `layers`.

    `all-linear` means the layers of the names that the file has. Not missed are the layers of another part of the model
    (a vision tower beside the text layers), and experts, which checkpoints name otherwise than models do.
    Raises: AdapterError that names the first layer that is too many or missing.
    """
    targets = config.get("target_modules")
    if targets is None:
        return
    if targets == "all-linear":
        targets = sorted({module.rpartition(".")[2] for module in modules})
    named, left_out = _matcher(path, "target_modules", targets), _left_out(path, config, targets)
    # With `ensure_weight_tying` peft adapts a tied head as it adapts the embedding, and does not name it.
    tied = ("lm_head",) if config.get("ensure_weight_tying") else ()
    extra = sorted(module for module in modules if (not named(module) or left_out(module)) and module not in tied)
    if extra:
        raise AdapterError(
            f"{path}: its weights adapt {extra[0]}, which is not among target_modules {shown(targets)}",
            expected="weights of the layers that the config names",
            remedy="Copy the adapter again, with its own adapter_config.json.",
        )
    parts = {_part(module) for module in modules}
    linear = (name.removesuffix(".weight") for name, info in layers.items() if len(info.shape) == 2)
    there = (name for name in linear if "embed" not in name.rpartition(".")[2] and ".experts." not in name)
    missing = sorted(
        name
        for name in there
        if f"{name}.weight" in layers and _part(name) in parts and named(name) and not left_out(name)
        if name not in modules
    )
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


def _matcher(path: Path, name: str, targets: object) -> Callable[[str], bool]:
    # peft's own rule: a text is a pattern of the whole name, a list holds names or their ends from a dot on.
    if isinstance(targets, str):
        pattern = re.compile(checked_pattern(path, name, targets))
        return lambda module: pattern.fullmatch(module) is not None
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        named = tuple(f".{target}" for target in targets)
        return lambda module: f".{module}".endswith(named)
    problem = f"{path}: {name} is {shown(targets)}"
    raise AdapterError(problem, expected="a list of layers' names, or a pattern")


def _left_out(path: Path, config: dict[str, Any], targets: object) -> Callable[[str], bool]:
    """Which of the layers named by `targets` the config takes back: excluded ones, and those of other depths."""
    excluded = config.get("exclude_modules")
    is_excluded = _matcher(path, "exclude_modules", excluded) if excluded else lambda module: False
    depths = config.get("layers_to_transform")
    if depths is None or depths == [] or not isinstance(targets, list):
        return is_excluded  # peft counts depths only with a list of names
    depths = [depths] if isinstance(depths, int) else depths
    if not isinstance(depths, list) or not all(type(depth) is int for depth in depths):
        problem = f"{path}: layers_to_transform is {shown(depths)}"
        raise AdapterError(problem, expected="the numbers of layers")
    lists = config.get("layers_pattern") or []
    lists = [lists] if isinstance(lists, str) else lists
    if not isinstance(lists, list):
        raise AdapterError(f"{path}: layers_pattern is {shown(lists)}", expected="names of lists of layers")
    numbered = [
        re.compile(rf"(?:^|.*?\.){checked_pattern(path, 'layers_pattern', name)}\.(\d+)\.") for name in lists
    ] or [_ANY_DEPTH]

    def left_out(module: str) -> bool:
        found = next((match for pattern in numbered if (match := pattern.match(module))), None)
        return is_excluded(module) or found is None or int(found[1]) not in depths

    return left_out


def _part(module: str) -> str:
    """The part of a model that a layer belongs to: its name up to the number of its depth."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[0]
