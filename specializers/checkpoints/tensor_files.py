"""Reading safetensors headers without torch: names, types, shapes and where each tensor's bytes lie.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the bytes).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.errors import BaseModelError

if TYPE_CHECKING:
    import numpy

__all__ = ["CorruptFileError", "TensorInfo", "base_tensors", "is_finite", "read_header", "read_values", "weight_files"]

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
# Bits of the exponent; a number is infinite or not a number when all of them are set.
_EXPONENT = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}


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
    """Read which tensors a safetensors file holds, and check that its bytes are all there.

    Raises: CorruptFileError saying what is wrong, OSError when the file cannot be opened.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise CorruptFileError(f"its header claims {length} bytes, the file has {size}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorruptFileError(f"its header is not JSON ({error})") from error
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, end = entry["data_offsets"]
            info = TensorInfo(entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"tensor {name!r} has no type, shape and place") from error
        if not 8 + length <= info.start <= info.end <= size:
            raise CorruptFileError(f"tensor {name!r} ends at byte {info.end}, the file has {size}")
        if info.dtype in _BYTES and math.prod(info.shape) * _BYTES[info.dtype] != info.end - info.start:
            raise CorruptFileError(f"tensor {name!r} has {info.end - info.start} bytes for {info.shape}")
        tensors[name] = info
    return tensors


def is_finite(path: Path, info: TensorInfo) -> bool:
    """Whether all values of a floating-point tensor are finite; other types count as finite."""
    if info.dtype not in _EXPONENT:
        return True
    import numpy

    kind, exponent = _EXPONENT[info.dtype]
    values: numpy.ndarray[Any, Any] = numpy.fromfile(path, dtype=kind, count=math.prod(info.shape), offset=info.start)
    return not bool(numpy.any((values & exponent) == exponent))


def read_values(path: Path, info: TensorInfo) -> numpy.ndarray[Any, Any]:
    """Values of one F32, F16 or BF16 tensor as float32, in its shape; raises CorruptFileError for other types."""
    import numpy

    if info.dtype not in _EXPONENT:
        raise CorruptFileError(f"its values are {info.dtype}, not one of {', '.join(_EXPONENT)}")
    kind = {"F16": "<f2", "F32": "<f4", "BF16": "<u2"}[info.dtype]
    values: numpy.ndarray[Any, Any] = numpy.fromfile(path, dtype=kind, count=math.prod(info.shape), offset=info.start)
    if info.dtype == "BF16":  # the upper half of a float32
        values = (values.astype("<u4") << 16).view("<f4")
    return values.astype(numpy.float32).reshape(info.shape)


def base_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Types and shapes of all tensors of a checkpoint, over all its files; packed layers also have a `weight`.

    Raises: BaseModelError when there are no weights in safetensors, or a file is missing or damaged.
    """
    found = {name: info for tensors in weight_files(folder).values() for name, info in tensors.items()}
    for name, info in list(found.items()):
        if name.endswith(".weight_packed"):  # int4, eight to a word: shown with the layer's shape
            rows, words = info.shape
            found[name.removesuffix("_packed")] = TensorInfo("I4", (rows, 8 * words), info.start, info.end)
    return found


def weight_files(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    """Types, shapes and places of the tensors of each file of a checkpoint.

    Raises: BaseModelError as `base_tensors`.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(folder, index.name).get("weight_map", {}).values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
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


def read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise BaseModelError(
            f"model folder {folder} lacks {name}",
            expected="a Hugging Face checkpoint folder",
            remedy="Copy or download the model again, whole.",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BaseModelError(f"{folder / name} is not JSON: {error}", remedy="Copy the model again.") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"{folder / name} holds {type(content).__name__}", expected="a JSON object")
    return content
