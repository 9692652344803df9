"""What variants take in memory when they are served, from their files and the engine's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ...router.assignment import BASE
from ...router.probing.profile import Footprint
from ...specializers.checkpoints.tensor_files import read_json
from ...specializers.machine.number_types import engine_number_type
from ...specializers.shelf.variant import Variant
from ..settings.engine import EngineSettings

__all__ = ["checkpoint_mib", "footprints", "footprints_elsewhere", "slot_mib"]

MIB = 2**20
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def footprints(
    variants: Mapping[str, Variant], checkpoint: Callable[[str], Path], settings: EngineSettings
) -> dict[str, Footprint]:
    """The footprint of the base and of every variant, by name; `checkpoint` finds a checkpoint's folder."""
    folders = {id: checkpoint(id) for id in {BASE, *(variant.checkpoint for variant in variants.values())}}
    weights = {id: checkpoint_mib(folder) for id, folder in folders.items()}
    slots = {id: slot_mib(folder, settings) for id, folder in folders.items()}
    found = {BASE: Footprint(checkpoint_mib=weights[BASE])}
    for name, variant in variants.items():
        has_adapter = variant.ask.adapter is not None
        found[name] = Footprint(
            checkpoint=variant.served_by,
            checkpoint_mib=weights[variant.checkpoint],
            adapter=variant.id if has_adapter else "",
            adapter_rank=variant.ask.rank,
            slot_mib=slots[variant.checkpoint],
        )
    return found


def footprints_elsewhere(names: Iterable[str], variants: Mapping[str, Variant]) -> dict[str, Footprint]:
    """As `footprints`, for engines on other machines: which variants share a checkpoint is known, their memory is not.
    A name that `variants` lack is taken for an adapter on the base.
    """
    found = {BASE: Footprint(memory_known=False)}
    for name in names:
        variant = variants.get(name)
        adapter = name if variant is None else variant.id if variant.ask.adapter else ""
        served_by = BASE if variant is None else variant.served_by
        found[name] = Footprint(checkpoint=served_by, adapter=adapter, memory_known=False)
    return found


def checkpoint_mib(folder: Path) -> float:
    """Size of a checkpoint's tensors on disk, which is what an engine holds of them."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / MIB


def slot_mib(folder: Path, settings: EngineSettings) -> float:
    """What the adapter slots of one engine hold: `slot_rank` rows and columns of every linear layer, for each slot.

    Computed for Llama-like checkpoints; 0 where the configuration lacks a shape that it needs.
    """
    config = read_json(folder, "config.json")
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    if not all(type(config.get(name)) is int and config[name] > 0 for name in names):
        return 0.0
    hidden, inner, heads, layers = (int(config[name]) for name in names)
    kv_heads, head = (config.get(name) for name in ("num_key_value_heads", "head_dim"))
    kv_heads = kv_heads if type(kv_heads) is int and kv_heads > 0 else heads
    head = head if type(head) is int and head > 0 else hidden // heads
    q, kv = heads * head, kv_heads * head
    ends = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    widths = sum(d_in + d_out for d_in, d_out in ends)
    dtype = engine_number_type(folder, settings.dtype).dtype
    numbers = layers * widths * settings.slot_rank * settings.adapter_slots
    return float(numbers * DTYPE_BYTES.get(dtype, 2) / MIB)
