"""Adapters from elsewhere onto the shelf: as they are where an engine serves their kind, else converted to LoRA."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...agents.errors import VariantError
from ...agents.prompts import PROMPT_LAYOUT
from ..shelf.adapter_kinds import kind_of_peft_type
from ..shelf.base_model import base_fingerprint, check_weights, find_base
from ..shelf.shelf import RECORD, Shelf, hash_file, hash_files, read_variant
from ..shelf.variant import AskSpec, EngineSpec, Variant
from .adapter_check import SLOT_RANKS, check_adapter, check_variant
from .adapter_conversion import convert_adapter
from .adapter_files import CONFIG, WEIGHTS, read_config

__all__ = ["adopt_adapter", "new_staging"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*\Z")


def adopt_adapter(
    folder: Path,
    *,
    name: str,
    shelf: Shelf,
    base: str | Path,
    max_rank: int = 64,
    accept_error: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Variant:
    """Check an adapter folder against `base`, put it on the shelf under `name`, and return its record.

    LoRA and T-REX adapters are copied as they are; other kinds are converted (see `convert_adapter`, which takes
    `max_rank`, `accept_error` and `on_progress`), and the card says what that lost. A variant's folder, as
    `metier variants export` writes it, is taken whole and keeps its content id. What prompt layout an adapter from
    elsewhere was trained with is not known: it is recorded with this version's, with which it will be asked.
    Raises: AdapterError when it cannot be served, VariantError for a name that cannot be used, or a variant's
    folder that was changed or lacks the weights it needs, BaseModelError for the base.
    """
    if not _NAME.match(name):
        raise VariantError(f"name {name!r}", expected="small letters, digits, and . _ - after the first")
    place = find_base(base)
    with new_staging(shelf) as staging:
        if (folder / RECORD).is_file():
            return shelf.add(staging, name=name, record=_copy_variant(folder, staging, shelf, place))
        fingerprint = base_fingerprint(place)
        peft_type = str(read_config(folder).get("peft_type"))
        method: dict[str, Any] = {"peft_type": peft_type}
        card: dict[str, Any] = {}
        if kind_of_peft_type(peft_type) is not None:
            facts = check_adapter(folder, place, slot_rank=SLOT_RANKS[-1])
            (staging / "adapter").mkdir()
            for file in (CONFIG, WEIGHTS):
                shutil.copyfile(folder / file, staging / "adapter" / file)
            ask = AskSpec(adapter=facts.kind, rank=facts.rank)
            method["method"] = "adopted"
        else:
            done = convert_adapter(
                folder,
                place,
                staging / "adapter",
                max_rank=max_rank,
                accept_error=accept_error,
                on_progress=on_progress,
            )
            ask = AskSpec(adapter="lora", rank=done.rank)
            method |= {"method": "converted", "sha256": hash_file(folder / WEIGHTS)}
            card = {
                "lost_share": done.error.as_card()["share"],
                "conversion": {"exact": done.exact, "exact_rank": done.exact_rank, **done.error.as_card()},
            }
        record = {
            "base": fingerprint,
            "recipe": {"methods": [method]},
            "prompt_layout": PROMPT_LAYOUT,
            "engine": EngineSpec(base=fingerprint),
            "ask": ask,
            "card": card,
        }
        return shelf.add(staging, name=name, record=record)


@contextmanager
def new_staging(shelf: Shelf) -> Iterator[Path]:
    """An empty folder beside the shelf's variants, never listed, gone at the end unless `Shelf.add` took it."""
    staging = shelf.folder / ".work" / uuid.uuid4().hex[:16]
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise VariantError(
            f"the shelf {shelf.folder} cannot be written: {error.strerror or error}",
            expected="a folder that can be written",
            remedy="Free space there, or choose another shelf.",
        ) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _copy_variant(folder: Path, staging: Path, shelf: Shelf, base: Path) -> dict[str, Any]:
    """Copy the files of a variant's folder and give its record."""
    variant = read_variant(folder)
    found = hash_files(folder)
    changed = sorted(file for file in {*found, *variant.files} if found.get(file) != variant.files.get(file))
    if changed:
        raise VariantError(
            f"variant folder {folder}: {changed[0]} is not what its record says",
            expected="the files of the record, unchanged",
            remedy="Export or copy it again, whole.",
        )
    if variant.engine.weights == "base":
        check_variant(variant, folder, base, slot_rank=SLOT_RANKS[-1])
    else:
        holder = folder if variant.engine.weights == "own" else shelf.path(variant.engine.weights)
        check_weights(variant, holder / "weights", base)
    for file in variant.files:
        (staging / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, staging / file)
    return {key: value for key, value in variant.model_dump().items() if key not in ("id", "name", "files")}
