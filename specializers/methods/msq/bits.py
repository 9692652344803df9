"""Which part of a model has how many bits: MSQ's bit map, and the rules by which bits are dropped.

Plain numbers: `bits` maps a unit's name to its width, sign included. A unit is what an engine computes as one
matrix and so has one width: {qkv, o, gate_up, down} of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["BitUnit", "average_bits", "bit_units", "bits_to_drop", "drop_bits", "drop_to_target", "rank_bits"]

_UNIT_OF = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}


@dataclass(frozen=True)
class BitUnit:
    """Layers of one width: their full names, the block they are in, and how many weights they have together."""

    name: str
    block: str
    layers: tuple[str, ...]
    weights: int


def bit_units(layers: Mapping[str, Sequence[int]]) -> list[BitUnit]:
    """Group linear layers (full name → shape) into units, named `model.layers.3.qkv`, in the order of their names."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        block, leaf = name.rsplit(".", 2)[0], name.rpartition(".")[2]
        members.setdefault((block, f"{block}.{_UNIT_OF.get(leaf, leaf)}"), []).append(name)
    return [
        BitUnit(unit, block, tuple(names), sum(layers[name][0] * layers[name][1] for name in names))
        for (block, unit), names in members.items()
    ]


def average_bits(bits: Mapping[str, int], units: Sequence[BitUnit]) -> float:
    """Mean bits per weight over the units; scales and layers outside the units do not count."""
    return sum(bits[unit.name] * unit.weights for unit in units) / sum(unit.weights for unit in units)


def bits_to_drop(sensitivity: Mapping[str, float]) -> dict[str, int]:
    """How many bits a unit loses at once: 2 where its sensitivity is below the mean, 1 elsewhere (section 3.3)."""
    mean = sum(sensitivity.values()) / len(sensitivity)
    return {name: 2 if value < mean else 1 for name, value in sensitivity.items()}


def drop_bits(
    bits: Mapping[str, int],
    drops: Mapping[str, int],
    nonzero: Mapping[str, float],
    sensitivity: Mapping[str, float],
    units: Sequence[BitUnit],
    *,
    below: float,
    min_bits: int,
    target_bits: float,
) -> dict[str, int]:
    """One round of dropping: units whose share of nonzero low bits is under `below` lose `drops` bits.

    The least sensitive go first, and it stops when the average reaches the target.
    """
    left = dict(bits)
    for unit in sorted(units, key=lambda unit: (sensitivity[unit.name], unit.name)):
        if average_bits(left, units) <= target_bits:
            break
        if left[unit.name] > min_bits and nonzero[unit.name] < below:
            left[unit.name] = max(left[unit.name] - drops[unit.name], min_bits)
    return left


def drop_to_target(
    bits: Mapping[str, int],
    sensitivity: Mapping[str, float],
    units: Sequence[BitUnit],
    *,
    min_bits: int,
    target_bits: float,
) -> dict[str, int]:
    """Drop bits one at a time, whatever they hold, where it hurts least per bit saved, until the average is reached.

    The error of rounding grows fourfold with each bit lost, and so does the sensitivity used here.
    """
    left, cost = dict(bits), {unit.name: sensitivity[unit.name] / unit.weights for unit in units}
    while average_bits(left, units) > target_bits:
        able = [unit.name for unit in units if left[unit.name] > min_bits]
        if not able:
            break
        name = min(able, key=lambda name: (cost[name], name))
        left[name] -= 1
        cost[name] *= 4
    return left


def rank_bits(
    importance: Mapping[str, float],
    units: Sequence[BitUnit],
    *,
    high: int,
    low: int,
    target_bits: float,
) -> dict[str, int]:
    """The bit map of layer-wise ordering: whole blocks, the most important at `high` bits, the rest at `low`.

    `importance` is by block. As many are at `high` as the target average allows. Source: Layer-Wise Quantization,
    arXiv 2406.17415.
    """
    bits = {unit.name: low for unit in units}
    for block in sorted(importance, key=lambda block: (-importance[block], block)):
        raised = bits | {unit.name: high for unit in units if unit.block == block}
        if average_bits(raised, units) > target_bits:
            break
        bits = raised
    return bits
