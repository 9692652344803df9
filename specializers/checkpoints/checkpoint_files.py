"""Checkpoints tensor by tensor, so that making a new one needs the memory of one tensor and not of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import torch

from ...agents.errors import BaseModelError
from ...agents.whole_files import whole_file
from .tensor_files import TensorInfo, read_json, weight_files

__all__ = ["AddedWeights", "CheckpointReader", "CheckpointWriter"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_COPY_BYTES = 1 << 20


class AddedWeights(Protocol):
    """What is added to a checkpoint's weights as they are read: `adapters/lora_deltas.py` has the one there is."""

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers it adds to, without `.weight`."""

    def add(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor `name`, given in float32, with what is added to it."""


class CheckpointReader:
    """Reads tensors of a checkpoint folder by name, over all its files.

    Raises: BaseModelError when a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = weight_files(folder)
        self.tensors: dict[str, TensorInfo] = {name: info for part in found.values() for name, info in part.items()}
        self._files = {name: path for path, part in found.items() for name in part}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The folder's `config.json`; raises BaseModelError when it is missing or damaged."""
        return read_json(self.folder, "config.json")

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored type, in memory of its own (no page of the file stays mapped)."""
        info = self.tensors[name]
        content = bytearray(info.end - info.start)
        with self._files[name].open("rb") as file:
            file.seek(info.start)
            file.readinto(content)
        if not content:
            return torch.empty(info.shape, dtype=self.dtype(name))
        return torch.frombuffer(content, dtype=self.dtype(name)).view(info.shape)

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor; raises BaseModelError for one that is not read here."""
        stored = self.tensors[name].dtype
        if stored not in _DTYPES:
            raise BaseModelError(
                f"{self._files[name]}: {name} is stored as {stored}",
                expected=f"one of {', '.join(_DTYPES)}",
                remedy="Start from a checkpoint in 16 or 32 bits.",
            )
        return _DTYPES[stored]

    def copy(self, name: str, target: BinaryIO) -> None:
        """Copy the bytes of one tensor to an open file."""
        info = self.tensors[name]
        with self._files[name].open("rb") as file:
            file.seek(info.start)
            left = info.end - info.start
            while left:
                piece = file.read(min(_COPY_BYTES, left))
                target.write(piece)
                left -= len(piece)


class CheckpointWriter:
    """Writes one safetensors file tensor by tensor, in any order, into the places its header promises.

    `tensors` gives type and shape of each by name. The file appears under its name when the `with` block ends
    without an error, and not at all otherwise. Raises: OSError when the disk is full.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Iterable[int]]]) -> None:
        self._path = path
        self._places: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        # The widest types first, as the format's own writer does, so that every tensor is aligned.
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name][0], tuple(tensors[name][1])
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            self._places[name] = (dtype, shape, at)
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._missing = set(tensors)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, whose type and shape must be the promised ones."""
        dtype, shape, at = self._places[name]
        assert tensor.dtype == dtype and tuple(tensor.shape) == shape, (name, tensor.dtype, tuple(tensor.shape))
        self._file.seek(len(self._header) + at)
        self._file.write(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
        self._missing.discard(name)

    def copy(self, name: str, source: CheckpointReader) -> None:
        """Take over one tensor as another checkpoint has it."""
        self._file.seek(len(self._header) + self._places[name][2])
        source.copy(name, self._file)
        self._missing.discard(name)

    def __enter__(self) -> CheckpointWriter:
        with ExitStack() as opened:
            part = opened.enter_context(whole_file(self._path))
            self._file = opened.enter_context(part.open("wb"))
            opened.push(self._check_all_written)
            self._file.write(self._header)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def _check_all_written(self, kind: type[BaseException] | None, *_raised: object) -> None:
        assert kind is not None or not self._missing, f"never written: {sorted(self._missing)}"
