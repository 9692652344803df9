"""Reading safetensors headers without torch: names, types, shapes and where each tensor's bytes lie.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the bytes).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from ...agents.errors import BaseModelError
from ...agents.text_files import UnreadableTextError, open_regular, parse_json, read_bounded, shown

if TYPE_CHECKING:
    import numpy

__all__ = [
    "FLOATS",
    "MOST_DIMENSIONS",
    "MOST_HEADER_BYTES",
    "CorruptFileError",
    "TensorInfo",
    "base_tensors",
    "largest_value",
    "read_header",
    "read_values",
    "weight_files",
]

_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""Types of floating-point numbers."""

MOST_HEADER_BYTES = 100_000_000
"""Longest header read, in bytes: the format's own limit."""

MOST_DIMENSIONS = 16
"""Most dimensions of a tensor."""

_CHUNK_VALUES = 2**20
_NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


class CorruptFileError(ValueError):
    """A file is no whole safetensors file; callers turn it into an error that names the remedy."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its type as safetensors writes it, its shape, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read which tensors a safetensors file holds, and check that its bytes are all there, each of one tensor.

    Raises: CorruptFileError saying what is wrong, OSError when the file cannot be opened.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= size - 8:
                raise CorruptFileError(f"its header claims {length} bytes, the file has {size}")
            if length > MOST_HEADER_BYTES:
                raise CorruptFileError(f"its header claims {length} bytes; at most {MOST_HEADER_BYTES} are read")
            header = parse_json(file.read(length))
    except UnreadableTextError as error:
        raise CorruptFileError(f"its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise CorruptFileError(f"its header is {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError("its metadata is not an object of texts")
    tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in header.items()}
    _check_places(tensors, 8 + length, size)
    return tensors


def largest_value(path: Path, info: TensorInfo) -> float:
    """Largest magnitude of a floating-point tensor's values, not finite if one is not; 0.0 for other types.

    Reads `_CHUNK_VALUES` values at a time.
    """
    import numpy

    if info.dtype not in FLOATS:
        return 0.0
    largest = 0.0
    left, start = math.prod(info.shape), info.start
    with numpy.errstate(all="ignore"):
        while left > 0:
            values = _floats(path, info.dtype, min(left, _CHUNK_VALUES), start)
            here = float(numpy.max(numpy.abs(values)))
            if not math.isfinite(here):
                return here
            largest = max(largest, here)
            left -= len(values)
            start += len(values) * _BYTES[info.dtype]
    return largest


def _tensor_info(name: str, entry: object, offset: int) -> TensorInfo:
    """One tensor of a header; `offset` is where the bytes of tensors begin in the file."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, places = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(places) or len(places) != 2:
        raise CorruptFileError(f"tensor {shown(name)} has no type, shape and place")
    if len(shape) > MOST_DIMENSIONS:
        raise CorruptFileError(f"tensor {shown(name)} has {len(shape)} dimensions; at most {MOST_DIMENSIONS} are read")
    return TensorInfo(dtype, tuple(shape), offset + places[0], offset + places[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_places(tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """Check that the tensors' bytes follow each other from `start` to the file's end, without a gap or an overlap."""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if not info.start <= info.end <= size:
            raise CorruptFileError(f"tensor {shown(name)} ends at byte {info.end}, the file has {size}")
        if info.start != start:
            what = "overlaps the one before it" if info.start < start else "leaves a gap before it"
            raise CorruptFileError(f"tensor {shown(name)} {what}")
        if info.dtype in _BYTES and math.prod(info.shape) * _BYTES[info.dtype] != info.end - info.start:
            raise CorruptFileError(f"tensor {shown(name)} has {info.end - info.start} bytes for {info.shape}")
        start = info.end
    if start != size:
        raise CorruptFileError(f"{size - start} bytes at its end belong to no tensor")


def _floats(path: Path, dtype: str, count: int, start: int) -> numpy.ndarray[Any, Any]:
    """`count` values from byte `start` on, as float32, or float64 where they are."""
    import numpy

    if dtype in _NUMPY:
        return numpy.fromfile(path, dtype=_NUMPY[dtype], count=count, offset=start)
    if dtype == "BF16":  # the upper half of a float32
        upper = numpy.fromfile(path, dtype="<u2", count=count, offset=start)
        found: numpy.ndarray[Any, Any] = (upper.astype("<u4") << 16).view("<f4")
        return found
    codes = numpy.fromfile(path, dtype="u1", count=count, offset=start)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (codes.astype("<u2") << 8).view("<f2").astype(numpy.float32)
    exponent, fraction = (codes >> 3) & 15, (codes & 7).astype(numpy.float32) / 8  # F8_E4M3
    size = numpy.where(
        exponent == 0, fraction * 2.0**-6, (1 + fraction) * numpy.exp2(exponent.astype(numpy.float32) - 7)
    )
    return numpy.where((codes & 127) == 127, numpy.nan, size)  # the sign does not matter to a magnitude


def read_values(path: Path, info: TensorInfo) -> numpy.ndarray[Any, Any]:
    """Values of one F32, F16 or BF16 tensor as float32, in its shape; raises CorruptFileError for other types."""
    import numpy

    if info.dtype not in ("F16", "BF16", "F32"):
        raise CorruptFileError(f"its values are {info.dtype}, not one of F16, BF16, F32")
    values = _floats(path, info.dtype, math.prod(info.shape), info.start)
    return values.astype(numpy.float32).reshape(info.shape)


def base_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Types and shapes of all tensors of a checkpoint, over all its files; packed layers also have a `weight`.

    Raises: BaseModelError when there are no weights in safetensors, or a file is missing or damaged.
    """
    found = {name: info for tensors in weight_files(folder).values() for name, info in tensors.items()}
    for name, info in list(found.items()):
        layer, _, part = name.rpartition(".")
        shape = _packed_shape(found, layer, part, info)
        if shape is not None:
            found[f"{layer}.weight"] = TensorInfo("I4", shape, info.start, info.end)
    return found


def _packed_shape(found: dict[str, TensorInfo], layer: str, part: str, info: TensorInfo) -> tuple[int, int] | None:
    """Shape [rows, inputs] of a layer of which this is the packed weight, eight integers a word; None of others."""
    if len(info.shape) != 2 or part not in ("weight_packed", "qweight"):
        return None
    first, second = info.shape
    if part == "weight_packed":
        return first, 8 * second
    scales = found.get(f"{layer}.scales")
    if scales is None or not scales.shape:
        return None
    packs_inputs = scales.shape[-1] == second  # gptq; awq packs rows
    return (second, 8 * first) if packs_inputs else (8 * second, first)


def weight_files(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    """Types, shapes and places of the tensors of each file of a checkpoint.

    Raises: BaseModelError as `base_tensors`.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _files_of_index(index)
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        # Some publishers put the same weights beside them once more, in a layout of their own.
        names = sorted(path.name for path in folder.glob("*.safetensors") if not path.match("consolidated*"))
    if not names:
        raise BaseModelError(
            f"model folder {folder} has no weights",
            expected="model.safetensors, or its parts with an index",
            remedy="Save it there with model.save_pretrained(folder).",
        )
    found: dict[Path, dict[str, TensorInfo]] = {}
    for name in names:
        try:
            found[folder / name] = read_header(folder / name)
        except (CorruptFileError, OSError) as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise BaseModelError(
                f"{folder / name} cannot be used: {reason}",
                expected="a whole safetensors file",
                remedy="Copy or download the model again.",
            ) from error
    return found


def _files_of_index(index: Path) -> list[str]:
    """The files that an index names, each a file beside it; raises BaseModelError for anything else."""
    places = read_json(index.parent, index.name).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) and all(map(_is_file_name, places.values())) else None
    if names is None:
        raise BaseModelError(
            f"{index} has no weight_map from tensors to files beside it",
            expected="the index that save_pretrained writes",
            remedy="Copy or download the model again.",
        )
    return sorted(names)


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and "\0" not in name


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; raises BaseModelError when there is none."""
    try:
        content = parse_json(read_bounded(folder / name), lenient=True)
    except OSError as error:
        raise BaseModelError(
            f"model folder {folder} lacks {name}",
            expected="a Hugging Face checkpoint folder",
            remedy="Copy or download the model again, whole.",
        ) from error
    except UnreadableTextError as error:
        raise BaseModelError(f"{folder / name} cannot be read: {error}", remedy="Copy the model again.") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"{folder / name} holds {type(content).__name__}", expected="a JSON object")
    return content
