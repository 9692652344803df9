"""Base models: bundled ones converted once into the user's cache, local folders, and Hugging Face ids."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...agents.errors import BaseModelError, VariantError, did_you_mean
from ...agents.text_files import shown
from ..checkpoints.output_head import HEAD, stores_own_head
from ..checkpoints.tensor_files import base_tensors, read_json, weight_files
from .bundled_model import BUNDLED, MANIFEST, convert_bundled, read_manifest
from .shelf import hash_files
from .variant import Variant

__all__ = ["base_fingerprint", "cache_folder", "check_base", "check_weights", "find_base", "verify_base"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+\Z")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_COUNTS = ("max_position_embeddings", "num_hidden_layers")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# The start of each tensor identifies a checkpoint (tuning moves nearly every weight) without reading it whole.
_FINGERPRINT_BYTES = 1024


def find_base(
    name_or_path: str | Path,
    *,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Give the checkpoint folder of a base model, converting or fetching it the first time.

    `name_or_path` is a bundled model (`smollm2-135m`), a local folder, or a Hugging Face id (`org/model`).
    `cache_dir` is by default `cache_folder()`; `progress` gets a line when something slow starts.
    Raises: BaseModelError when there is no such model, something is missing in it, or the cache cannot be used.
    """
    name = str(name_or_path)
    say = progress or (lambda _line: None)
    if isinstance(name_or_path, str) and name in BUNDLED:
        return convert_bundled(name, cache_dir or cache_folder(), say)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        check_base(folder)
        return folder.resolve()
    if isinstance(name_or_path, str) and _HUB_ID.match(name) and not name.startswith("."):
        return _fetch(name, say)
    raise BaseModelError(
        f"there is no base model {name!r}",
        expected=f"{', '.join(sorted(BUNDLED))}, a local folder, or a Hugging Face id such as org/model",
        remedy=did_you_mean(name, BUNDLED, "Correct the name or the path."),
    )


def cache_folder() -> Path:
    """Where converted models and compiled operators are kept: $METIER_CACHE, or the user's cache folder."""
    chosen = os.environ.get("METIER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("metier")


def check_base(folder: Path) -> None:
    """Check that a folder holds a whole checkpoint: config, tokenizer with chat template, weights.

    Raises: BaseModelError naming what is missing or damaged.
    """
    config = read_json(folder, "config.json")
    _check_config(folder / "config.json", config)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise BaseModelError(
            f"model folder {folder} has no tokenizer",
            expected=f"one of {', '.join(_TOKENIZERS)}",
            remedy="Save it there with tokenizer.save_pretrained(folder).",
        )
    if not (folder / "chat_template.jinja").is_file() and not read_json(folder, "tokenizer_config.json").get(
        "chat_template"
    ):
        raise BaseModelError(
            f"the tokenizer in {folder} has no chat template",
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            remedy="Use an instruction-tuned model, or add a template.",
        )
    base_tensors(folder)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Check what is read of a config before an engine or transformers checks the rest."""
    if not isinstance(config.get("model_type"), str):
        raise BaseModelError(f"{path} has no model_type", expected="a transformers config")
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise BaseModelError(f"{path}: text_config is {shown(text)}", expected="an object, as transformers writes it")
    for name, value in {**text, **config}.items():
        if name in _COUNTS and value is not None and (type(value) is not int or value < 1):
            raise BaseModelError(f"{path}: {name} is {shown(value)}", expected="a whole number above 0")


def check_weights(variant: Variant, weights: Path, base: Path) -> None:
    """Check that a variant's own checkpoint (or its ancestor's) is whole and descends from the base in use.

    Raises: VariantError naming the variant, and what is missing, damaged or of another base.
    """
    expected = base_fingerprint(base)
    if variant.base != expected:
        raise VariantError(
            f"variant {variant.name!r} was made from base {variant.base}",
            expected=f"the base in use, {expected}",
            remedy="Open the session on the variant's own base, or make the variant from this one.",
        )
    try:
        check_base(weights)
    except BaseModelError as error:
        raise VariantError(
            f"the weights of variant {variant.name!r} cannot be served: {error.problem}",
            expected=error.expected,
            remedy="Make the variant again from its recipe, or copy its folder again.",
        ) from error


def base_fingerprint(folder: Path) -> str:
    """Name a base by content: 16 hex digits over the names, types, shapes and first bytes of its tensors.

    The same for every copy and sharding of a checkpoint; a few milliseconds, so nothing is cached.
    Raises: BaseModelError as `base_tensors`.
    """
    own_head = stores_own_head(folder)
    parts: dict[str, bytes] = {}
    for path, tensors in weight_files(folder).items():
        with path.open("rb") as file:
            for name, info in tensors.items():
                if name == HEAD and not own_head:
                    continue  # some writers store the tied copy, some do not
                file.seek(info.start)
                start = file.read(min(_FINGERPRINT_BYTES, info.end - info.start))
                parts[name] = f"{name} {info.dtype} {list(info.shape)} ".encode() + start
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(hashlib.sha256(parts[name]).digest())
    return digest.hexdigest()[:16]


def verify_base(folder: Path) -> None:
    """Hash every file of a converted model against what was written; other folders are only checked.

    Raises: BaseModelError that names the file that changed.
    """
    check_base(folder)
    if not (folder / MANIFEST).is_file():
        return
    found = hash_files(folder)
    for name, expected in read_manifest(folder).files.items():
        if found.get(name) != expected:
            raise BaseModelError(
                f"{folder / name} has SHA-256 {found.get(name)}",
                expected=expected,
                remedy=f"Delete {folder}; it is converted again at the next start.",
            )


def _fetch(name: str, say: Callable[[str], None]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BaseModelError(
            f"fetching {name!r} needs huggingface_hub",
            expected="the `cpu` or `gpu` extra",
            remedy="pip install 'metier[cpu]'",
        ) from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
        check_base(folder)  # what an interrupted download left is not whole
        return folder
    except (OSError, ValueError, BaseModelError):
        say(f"fetching {name} from Hugging Face")
    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the client raises many kinds: offline, not found, gated, disk full
        raise BaseModelError(
            f"base model {name!r} is not in the local cache and cannot be fetched: {error}",
            expected="a model on Hugging Face that this machine can reach",
            remedy="Check the id and the network, or give a local folder.",
        ) from error
    check_base(folder)
    return folder
