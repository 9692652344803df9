"""Weights as a model computes with them, whatever way a checkpoint stores them: plain, or in few bits by some tool.

Quantised layers `m` of [rows, inputs] that are read:
- compressed-tensors and `fp8`: `m.weight` int8 or float8, or `m.weight_packed` int32 with several integers a word,
  lowest bits first, each plus half the range; `m.weight_scale` (or `weight_scale_inv`) for all, for each row, for
  groups of inputs or for blocks; `m.weight_zero_point` where zero is no integer 0; `m.weight_g_idx` where inputs
  were put into groups out of order;
- `gptq`: `m.qweight` int32 [inputs / n, rows], `m.scales` [groups, rows], `m.qzeros`, `m.g_idx`;
- `awq`: `m.qweight` int32 [inputs, rows / 8] in an order of its own, `m.scales` [groups, rows], `m.qzeros`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...agents.errors import RecipeError
from .checkpoint_files import CheckpointReader
from .quantisers import dequantise

__all__ = ["dense_names", "quantised_layers", "read_dense", "rounds_inputs", "unpack_integers"]

_METHODS = ("compressed-tensors", "fp8", "gptq", "awq")
_SCALES = ("weight_scale", "weight_scale_inv", "scales")
_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point"),
    *("weight_g_idx", "input_scale", "input_zero_point", "output_scale", "output_zero_point"),
    *("qweight", "qzeros", "scales", "g_idx"),
)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word is of


def quantised_layers(reader: CheckpointReader) -> set[str]:
    """Names of the layers that a checkpoint stores quantised.

    Raises: RecipeError for a way of storing that is not known.
    """
    quantisation = reader.config.get("quantization_config")
    if quantisation is None:
        return set()
    method = quantisation.get("quant_method")
    odd = next((n for n in reader.tensors if n.endswith((".weight_global_scale", ".bitmask", ".compressed"))), None)
    if method not in _METHODS or odd is not None:
        raise RecipeError(
            f"the weights in {reader.folder.name!r} are quantised by {method!r}" + (f", with {odd}" if odd else ""),
            expected=f"integers or float8 by one of {', '.join(_METHODS)}",
            remedy="Start from the model that they were made of.",
        )
    return {name.rpartition(".")[0] for name in reader.tensors if name.rpartition(".")[2] in _SCALES}


def rounds_inputs(reader: CheckpointReader, layer: str) -> bool:
    """Whether a layer is W8A8, so that its inputs are rounded too, with a scale for each token."""
    if f"{layer}.weight_scale" not in reader.tensors or f"{layer}.weight" not in reader.tensors:
        return False
    groups = reader.config.get("quantization_config", {}).get("config_groups", {}).values()
    dynamic = any((group.get("input_activations") or {}).get("dynamic") for group in groups)
    return dynamic and reader.tensors[f"{layer}.weight"].dtype == "I8"


def dense_names(reader: CheckpointReader) -> list[str]:
    """Names of the tensors a checkpoint has once quantised layers are dense again."""
    layers = quantised_layers(reader)
    others = [n for n in reader.tensors if n.rpartition(".")[0] not in layers or n.rpartition(".")[2] not in _PARTS]
    return sorted([*others, *(f"{layer}.weight" for layer in layers)])


def read_dense(reader: CheckpointReader, name: str, dtype: torch.dtype) -> torch.Tensor:
    """One tensor by its name in a dense checkpoint, dequantised where it has to be."""
    layer = name.removesuffix(".weight")
    if f"{layer}.qweight" in reader.tensors:
        awq = reader.config["quantization_config"]["quant_method"] == "awq"
        return (_read_awq if awq else _read_gptq)(reader, layer).to(dtype)
    scale_name = next((f"{layer}.{n}" for n in _SCALES[:2] if f"{layer}.{n}" in reader.tensors), None)
    if scale_name is None:
        return reader.read(name).to(dtype)
    scale = reader.read(scale_name)
    values, zero = _read_integers(reader, layer, name)
    order = f"{layer}.weight_g_idx"
    if order in reader.tensors:
        group = reader.read(order).long()
        return ((values.float() - (0 if zero is None else zero[:, group])) * scale.float()[:, group]).to(dtype)
    if zero is None and scale.ndim == 2 and scale.shape[0] == values.shape[0]:
        return dequantise(values, scale).to(dtype)
    block = _block(reader)
    shifted = values.float() if zero is None else values.float() - _spread(zero.float(), values, block)
    return (shifted * _spread(scale.float(), values, block)).to(dtype)


def unpack_integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers of so many bits out of int32 words [rows, n], lowest bits first: [rows, n · 32 / bits]."""
    shifts = torch.arange(0, 32, bits)
    return ((packed.long()[..., None] >> shifts) & (2**bits - 1)).flatten(1)


def _read_integers(reader: CheckpointReader, layer: str, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values [rows, inputs] of a layer of compressed-tensors or fp8, and its zero points as its scales are."""
    zero_name = f"{layer}.weight_zero_point"
    zero = reader.read(zero_name) if zero_name in reader.tensors else None
    if f"{layer}.weight_packed" not in reader.tensors:
        return reader.read(name), zero
    rows, inputs = reader.read(f"{layer}.weight_shape").tolist()
    packed = reader.read(f"{layer}.weight_packed")
    bits = _packed_bits(reader, inputs, packed.shape[1])
    half = 2 ** (bits - 1)
    if zero is not None:
        zero = unpack_integers(zero.T, bits).T[:rows] - half
    return unpack_integers(packed, bits)[:, :inputs] - half, zero


def _packed_bits(reader: CheckpointReader, inputs: int, words: int) -> int:
    bits = next((bits for bits in (2, 4, 8) if math.ceil(inputs * bits / 32) == words), None)
    if bits is None:
        raise RecipeError(
            f"layers in {reader.folder.name!r} pack {inputs} integers into {words} words",
            expected="integers of 2, 4 or 8 bits",
            remedy="Start from the model that they were made of.",
        )
    return bits


def _block(reader: CheckpointReader) -> tuple[int, int] | None:
    """Rows and inputs of the blocks that share a scale, None where there are no blocks."""
    settings: dict[str, Any] = reader.config["quantization_config"]
    kinds = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
    for block in (settings.get("weight_block_size"), *(kind.get("block_structure") for kind in kinds)):
        if block:
            return int(block[0]), int(block[1])
    return None


def _spread(scale: torch.Tensor, values: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """A scale for all, for rows, for groups of inputs or for blocks, as one that fits `values` [rows, inputs]."""
    if scale.numel() == 1:
        return scale.view(1, 1)
    scale = scale.view(-1, 1) if scale.ndim == 1 else scale
    for axis in (0, 1):
        size = values.shape[axis]
        if scale.shape[axis] not in (1, size):
            each = block[axis] if block else math.ceil(size / scale.shape[axis])
            scale = scale.repeat_interleave(each, axis).narrow(axis, 0, size)
    return scale


def _read_gptq(reader: CheckpointReader, layer: str) -> torch.Tensor:
    settings: dict[str, Any] = reader.config["quantization_config"]
    bits = int(settings["bits"])
    if bits not in (2, 4, 8):
        raise RecipeError(
            f"{layer} has {bits} bits", expected="2, 4 or 8", remedy="Start from the model that it was made of."
        )
    values = unpack_integers(reader.read(f"{layer}.qweight").T, bits)  # [rows, inputs]
    zeros = unpack_integers(reader.read(f"{layer}.qzeros"), bits).T  # [rows, groups]
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)  # stored less one
    scales = reader.read(f"{layer}.scales").float().T
    if f"{layer}.g_idx" in reader.tensors:
        group = reader.read(f"{layer}.g_idx").long()
    else:
        group = torch.arange(values.shape[1]) * scales.shape[1] // values.shape[1]
    return (values - zeros[:, group]) * scales[:, group]


def _read_awq(reader: CheckpointReader, layer: str) -> torch.Tensor:
    def in_order(packed: torch.Tensor) -> torch.Tensor:
        nibbles = unpack_integers(packed, 4).view(packed.shape[0], -1, 8)
        return nibbles[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(1)

    values, zeros = in_order(reader.read(f"{layer}.qweight")), in_order(reader.read(f"{layer}.qzeros"))
    scales = reader.read(f"{layer}.scales").float()  # [groups, rows]
    group = torch.arange(values.shape[0]) * scales.shape[0] // values.shape[0]
    return ((values - zeros[group]) * scales[group]).T.contiguous()
