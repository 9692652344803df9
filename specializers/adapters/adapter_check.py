"""Checks of an adapter folder before an engine sees it: engines accept some wrong ones and die on others."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ...agents.errors import AdapterError
from ...agents.prompts import PROMPT_LAYOUT
from ..checkpoints.tensor_files import base_tensors
from ..shelf.adapter_kinds import ADAPTER_KINDS, AdapterKind, kind_of_peft_type
from ..shelf.base_model import base_fingerprint
from ..shelf.variant import Variant
from .adapter_files import CONFIG, WEIGHTS, AdapterFacts, check_values, read_config, read_tensors
from .target_check import check_targets

__all__ = ["SLOT_RANKS", "AdapterFacts", "check_adapter", "check_variant"]

SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The slot sizes an engine may be started with, in rows (vLLM's own list)."""


def check_adapter(folder: Path, base: Path, *, slot_rank: int) -> AdapterFacts:
    """Check a LoRA or T-REX adapter folder (peft layout) against the base it is to be served on.

    All of it is read: file, keys, shapes against the base's own layers, declared against real rank, rows against
    the engine's `slot_rank`, a T-REX adapter's semantic map against its embed function, the layers that the config
    names against those of the file, and that every value is finite and of a magnitude that engines can hold.
    Takes milliseconds and needs no torch.
    Raises: AdapterError that names the file, key or value that is wrong.
    """
    config = read_config(folder)
    kind = kind_of_peft_type(config.get("peft_type"))
    if kind is None:
        raise AdapterError(
            f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}",
            expected=" or ".join(repr(kind.peft_type) for kind in ADAPTER_KINDS.values()),
            remedy=f"`metier variants add {shlex.quote(str(folder))} --name NAME` converts it, where that is possible.",
        )
    tensors = read_tensors(folder)
    layers = base_tensors(base)
    facts = _check_of(kind)(folder, config, tensors, layers, base)
    check_targets(folder / CONFIG, config, facts.modules, layers)
    _check_slot(folder, kind, facts, slot_rank)
    check_values(folder / WEIGHTS, tensors, facts)
    return facts


def check_variant(variant: Variant, folder: Path, base: Path, *, slot_rank: int) -> AdapterFacts | None:
    """Check that a variant can be served on this base: its base, its prompt layout, and its adapter if any.

    Raises: AdapterError for the first thing that does not fit.
    """
    found = base_fingerprint(base)
    if variant.base != found:
        raise AdapterError(
            f"variant {variant.name!r} was made for base {variant.base}",
            expected=f"the base in use, {found} ({base.name})",
            remedy="Open the session on the variant's own base, or make the variant again for this one.",
        )
    if variant.prompt_layout > PROMPT_LAYOUT:
        raise AdapterError(
            f"variant {variant.name!r} was trained with prompt layout {variant.prompt_layout}",
            expected=f"at most layout {PROMPT_LAYOUT}, the newest that this version has",
            remedy="Make it again from its recipe: at another layout its quality is unknown.",
        )
    if variant.ask.adapter is None:
        return None
    facts = check_adapter(folder / "adapter", base, slot_rank=slot_rank)
    if (facts.kind, facts.rank) != (variant.ask.adapter, variant.ask.rank):
        raise AdapterError(
            f"variant {variant.name!r} is recorded as {variant.ask.adapter} with rank {variant.ask.rank}",
            expected=f"{facts.kind} with rank {facts.rank}, as its adapter has",
            remedy="Its folder was changed: copy it again, or make it again.",
        )
    return facts


def _check_of(kind: AdapterKind) -> Callable[..., AdapterFacts]:
    module, _, function = kind.check.partition(":")
    check: Callable[..., AdapterFacts] = getattr(import_module(f".{module}", __package__), function)
    return check


def _check_slot(folder: Path, kind: AdapterKind, facts: AdapterFacts, slot_rank: int) -> None:
    if facts.rank <= slot_rank:
        return
    enough = next((rank for rank in SLOT_RANKS if rank >= facts.rank), None)
    remedy = f"Start the engine with slot_rank={enough}" if enough else f"No engine has more than {SLOT_RANKS[-1]}"
    raise AdapterError(
        f"{kind.title} {folder} needs {facts.rank} rows of a slot ({kind.slot_rows})",
        expected=f"at most the engine's slot_rank={slot_rank}",
        remedy=f"{remedy}, or make the adapter with {kind.fewer_rows}.",
    )
