"""Adapters from elsewhere onto the shelf: as they are, converted to LoRA, or merged into a checkpoint of their own."""

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
from ..checkpoints.self_check import make_self_check
from ..shelf.adapter_kinds import kind_of_peft_type
from ..shelf.base_model import base_fingerprint, check_base, check_weights, find_base
from ..shelf.shelf import RECORD, Shelf, hash_file, hash_files, read_variant
from ..shelf.variant import AskSpec, EngineSpec, Variant
from .adapter_check import SLOT_RANKS, check_adapter, check_variant
from .adapter_conversion import convert_adapter
from .adapter_files import WEIGHTS, read_config
from .adapter_mending import naming, write_mended
from .adapter_merging import merge_adapter
from .adapter_origin import check_origin
from .adapter_shards import join_shards

__all__ = ["adopt_adapter", "merge_onto_shelf", "new_staging"]

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

    LoRA and T-REX adapters are copied as they are, or with names mended that other tools wrote (see `write_mended`; the
    record says what). Other kinds are converted (see `convert_adapter`, which takes `max_rank`, `accept_error` and
    `on_progress`), and the card says what that lost, and which base an adapter was made for where that is not known to
    be this one. A variant's folder, as `metier variants export` writes it, is taken whole and keeps its content id.
    What prompt layout an adapter from elsewhere was trained with is not known: it is recorded with this version's, with
    which it will be asked.
    Raises: AdapterError when it cannot be served, VariantError for a name that cannot be used, or a variant's
    folder that was changed or lacks the weights it needs, BaseModelError for the base.
    """
    place = _checked_place(name, base)
    with new_staging(shelf) as staging, _in_one_file(folder, shelf) as folder:
        if (folder / RECORD).is_file():
            return shelf.add(staging, name=name, record=_copy_variant(folder, staging, shelf, place))
        config = read_config(folder)
        peft_type = str(config.get("peft_type"))
        method: dict[str, Any] = {"peft_type": peft_type}
        card: dict[str, Any] = {}
        if kind_of_peft_type(peft_type) is not None:
            with naming(folder, not_copy=staging / "adapter"):
                mended = write_mended(folder, staging / "adapter", place)
                facts = check_adapter(staging / "adapter", place, slot_rank=SLOT_RANKS[-1])
            card = _origin_card(folder, config, base, place)
            ask = AskSpec(adapter=facts.kind, rank=facts.rank)
            method["method"] = "adopted"
            if mended:
                method |= {"mended": list(mended), "sha256": hash_file(folder / WEIGHTS)}
        else:
            card = _origin_card(folder, config, base, place)
            with naming(folder, not_copy=staging / "mended"):
                write_mended(folder, staging / "mended", place)
                done = convert_adapter(
                    staging / "mended",
                    place,
                    staging / "adapter",
                    max_rank=max_rank,
                    accept_error=accept_error,
                    on_progress=on_progress,
                )
            shutil.rmtree(staging / "mended")
            ask = AskSpec(adapter="lora", rank=done.rank)
            method |= {"method": "converted", "sha256": hash_file(folder / WEIGHTS)}
            card |= {
                "lost_share": done.error.as_card()["share"],
                "conversion": {"exact": done.exact, "exact_rank": done.exact_rank, **done.error.as_card()},
            }
        return shelf.add(staging, name=name, record=_record(place, method, card) | {"ask": ask})


def merge_onto_shelf(
    folder: Path,
    *,
    name: str,
    shelf: Shelf,
    base: str | Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> Variant:
    """Put `base` with the adapter in `folder` merged into its weights on the shelf, and return its record.

    The card says what rounding to the base's format lost, and which words an engine started on it has to say.
    Raises: AdapterError when it cannot be merged (see `merge_adapter`), VariantError for a name that cannot be used or
    a shelf that cannot be written, BaseModelError for the base.
    """
    place = _checked_place(name, base)
    with new_staging(shelf) as staging, _in_one_file(folder, shelf) as folder:
        card = _origin_card(folder, read_config(folder), base, place)
        done = merge_adapter(folder, place, staging / "weights", on_progress=on_progress)
        check_base(staging / "weights")
        method = {"method": "merged", "peft_type": done.peft_type, "sha256": hash_file(folder / WEIGHTS)}
        card |= {
            "lost_share": done.error.as_card()["share"],
            "merge": {"head_parted": done.untied, **done.error.as_card()},
            "self_check": make_self_check(staging / "weights"),
        }
        record = _record(place, method, card)
        engine = record["engine"].model_copy(update={"weights": "own"})
        return shelf.add(staging, name=name, record=record | {"engine": engine})


def _checked_place(name: str, base: str | Path) -> Path:
    if not _NAME.match(name):
        raise VariantError(f"name {name!r}", expected="small letters, digits, and . _ - after the first")
    return find_base(base)


def _origin_card(folder: Path, config: dict[str, Any], base: str | Path, place: Path) -> dict[str, Any]:
    """The card of an adapter that names a base not known to be this one."""
    other = check_origin(folder, config, base, place)
    return {} if other is None else {"made_for": other}


def _record(place: Path, method: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    fingerprint = base_fingerprint(place)
    return {
        "base": fingerprint,
        "recipe": {"methods": [method]},
        "prompt_layout": PROMPT_LAYOUT,
        "engine": EngineSpec(base=fingerprint),
        "card": card,
    }


@contextmanager
def _in_one_file(folder: Path, shelf: Shelf) -> Iterator[Path]:
    """The adapter's folder, or a copy of it for as long as it is entered, where its weights are in several files."""
    with new_staging(shelf) as spare, naming(folder, not_copy=spare / "joined"):
        yield join_shards(folder, spare / "joined")


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
    except OSError as error:
        raise VariantError(
            f"what is to be put on the shelf {shelf.folder} cannot be copied: {error}",
            expected="files that can be read, and room on the shelf's disk",
            remedy="Free space there, or choose another shelf.",
        ) from error
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
