"""LoRA folders as other tools write them, in the one form that engines read: names as the base has them, nothing else.

Training wrappers (torch.compile, FSDP, DDP, adapter names) leave words of their own in the keys, models with a vision
part put `language_model.` before their layers, and some kinds of training save what only training needs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.errors import AdapterError
from ...agents.text_files import shown
from ..checkpoints.tensor_files import TensorInfo, base_tensors
from ..shelf.adapter_kinds import kind_of_peft_type
from .adapter_files import CONFIG, PEFT_PREFIX, WEIGHTS, merge_remedy, read_config, read_tensors
from .lora_check import check_lora_numbers, check_lora_settings
from .lora_scaling import layer_alpha, layer_rank

if TYPE_CHECKING:
    import torch

__all__ = ["mended_names", "naming", "write_mended"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_OUTER = ("base_model", "model", "module", "language_model")
# Tensors that only training uses: VeLoRA's projection of saved activations, MonteCLoRA's sampler.
_TRAINING_SETTINGS = ("velora_config", "monteclora_config")
_TRAINING_ONLY = re.compile(r"\.lora_(velora|monteclora)_")
_NAMED_HALF = re.compile(r"(lora_[AB])\.[^.]+\.weight\Z")
_COPIED = ("F32", "F16", "BF16")
_COPY_OF_BASE = re.compile(r"\.(base_layer\.)?weight\Z")


def write_mended(folder: Path, out: Path, base: Path, *, for_engine: bool = True) -> tuple[str, ...]:
    """Write the adapter of `folder` to `out` in the form that engines and peft read, and return what had to be changed.

    Without `for_engine` only names are mended, which is what peft needs; the rest it knows itself. The files are copied
    byte by byte where nothing has to be. A copy of the base's own embedding or head, which peft saves beside an adapter
    of it, is left out.
    Raises: AdapterError when a copy differs from the base (it was trained too), two tensors would have one name, or
    the settings of a LoRA are no such.
    """
    config, tensors, layers = read_config(folder), read_tensors(folder), base_tensors(base)
    kind = kind_of_peft_type(config.get("peft_type"))
    is_lora = kind is not None and kind.mergeable
    for_engine = for_engine and is_lora
    if is_lora:
        (check_lora_settings if for_engine else check_lora_numbers)(folder / CONFIG, config)
    out.mkdir(parents=True, exist_ok=True)
    names = mended_names(tensors, layers)
    training = [old for old in names if for_engine and _TRAINING_ONLY.search(old)]
    copies = _copies_of_base(folder, names, tensors, layers, base) if for_engine else []
    kept = {old: new for old, new in names.items() if old not in training and old not in copies}
    renamed = {old: new for old, new in kept.items() if old != new}
    if not renamed and not training and not copies:
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / file, out / file)
        return ()
    if len(set(kept.values())) < len(kept):
        raise AdapterError(
            f"{folder / WEIGHTS} holds two adapters for some layers",
            expected="one",
            remedy="Save the adapter again by itself.",
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        values: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except SafetensorError as error:  # types of numbers that it does not know
        raise AdapterError(f"{folder / WEIGHTS} cannot be read: {error}", expected="tensors of numbers") from error
    save_file({new: values[old] for old, new in sorted(kept.items())}, out / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(_mended_config(config, kept, for_engine) if is_lora else config, indent=2, sort_keys=True) + "\n"
    (out / CONFIG).write_text(text, encoding="utf-8")
    said = {"names of tensors": renamed, "tensors of training": training, "copies of the base's weights": copies}
    return tuple(what for what, found in said.items() if found)


@contextmanager
def naming(folder: Path, *, not_copy: Path) -> Iterator[None]:
    """Let errors about the files of a mended copy name the folder that people know."""
    try:
        yield
    except AdapterError as error:
        said = (text.replace(str(not_copy), str(folder)) for text in (error.problem, error.expected, error.remedy))
        problem, expected, remedy = said
        raise AdapterError(problem, expected=expected, remedy=remedy) from error


def mended_names(tensors: Iterable[str], layers: dict[str, TensorInfo]) -> dict[str, str]:
    """Each tensor's name as peft writes it for a base with `layers`; names that fit no layer stay as they are."""
    modules: dict[tuple[str, ...], set[str]] = {}
    for name in {layer.rpartition(".")[0] for layer in layers} | {"lm_head"}:
        modules.setdefault(_inner(name.split(".")), set()).add(name)
    return {name: _mended(name, modules) for name in tensors}


def _mended(name: str, modules: dict[tuple[str, ...], set[str]]) -> str:
    parts = _inner([part for part in name.split(".") if part not in _WRAPPERS])
    for length in range(len(parts) - 1, 0, -1):
        found = modules.get(parts[:length], set())
        if len(found) == 1:
            rest = ".".join(part for part in parts[length:] if part != "default")
            rest = _NAMED_HALF.sub(r"\1.weight", rest)
            return f"{PEFT_PREFIX}{next(iter(found))}.{rest}"
    return name


def _inner(parts: list[str]) -> tuple[str, ...]:
    """A name without what stands before the parts that tell its layer from others."""
    start = next((n for n, part in enumerate(parts) if part not in _OUTER), len(parts))
    return tuple(parts[start:])


def _copies_of_base(
    folder: Path, names: dict[str, str], tensors: dict[str, TensorInfo], layers: dict[str, TensorInfo], base: Path
) -> list[str]:
    """Tensors that are the base's own embedding or head."""
    copies = []
    for old, new in names.items():
        own = _COPY_OF_BASE.sub(".weight", new.removeprefix(PEFT_PREFIX))
        if own not in layers and own == "lm_head.weight":  # a tied head is stored as the embedding
            own = next((name for name in layers if name.endswith("embed_tokens.weight")), own)
        if own not in layers:
            continue
        copy = tensors[old]
        if layers[own].shape != copy.shape or copy.dtype not in _COPIED or not _equal(base, own, folder, old):
            raise AdapterError(
                f"{folder / WEIGHTS}: {shown(old)} is not what base {base.name} has",
                expected="an adapter without trained weights of the base",
                remedy=merge_remedy(folder),
            )
        copies.append(old)
    return copies


def _equal(base: Path, own: str, folder: Path, copy: str) -> bool:
    import torch

    from ..checkpoints.checkpoint_files import CheckpointReader

    theirs = CheckpointReader(folder).read(copy)
    return bool(torch.equal(CheckpointReader(base).read(own).to(theirs.dtype), theirs))


def _mended_config(config: dict[str, Any], names: dict[str, str], for_engine: bool) -> dict[str, Any]:
    """The config with layers named as in the file written: ranks and scalings stay what they were by the old names.

    For an engine, what only training uses is left out of it too.
    """
    if for_engine:
        config = {name: value for name, value in config.items() if name not in _TRAINING_SETTINGS}
    halves = {old: new for old, new in names.items() if ".lora_A." in new or new.endswith(".lora_embedding_A")}
    moved = {_layer_of(old): _layer_of(new) for old, new in halves.items()}
    if all(old == new for old, new in moved.items()):
        return config
    changed = dict(config)
    for pattern, value_of in (("rank_pattern", layer_rank), ("alpha_pattern", layer_alpha)):
        if config.get(pattern):
            changed[pattern] = {re.escape(new): value_of(config, old) for old, new in moved.items()}
    targets = config.get("target_modules")
    if isinstance(targets, str) or (isinstance(targets, list) and any("." in str(target) for target in targets)):
        changed["target_modules"] = sorted(moved.values())
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            changed.pop(name, None)
    return changed


def _layer_of(name: str) -> str:
    """The layer's name in a tensor's name, as the model had it that the adapter was trained with."""
    kept = [part for part in name.split(".") if part not in _WRAPPERS]
    layer = re.split(r"\.lora_(?:embedding_)?A", ".".join(kept))[0]
    return layer.removeprefix(PEFT_PREFIX)
