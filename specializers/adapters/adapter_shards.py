"""Adapters whose weights come in several files, as one folder in the usual layout."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ...agents.errors import AdapterError
from ..checkpoints.tensor_files import CorruptFileError, read_header
from .adapter_files import CONFIG, WEIGHTS

__all__ = ["join_shards"]

_SHARD = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")


def join_shards(folder: Path, out: Path) -> Path:
    """`folder` itself where its weights are in one file, else `out`, into which they are written as one.

    Raises: AdapterError when a part is missing or damaged, or two hold a tensor of one name.
    """
    shards = {path: match for path in sorted(folder.glob("*.safetensors")) if (match := _SHARD.fullmatch(path.name))}
    if (folder / WEIGHTS).exists() or not shards:
        return folder
    counts = {int(match[2]) for match in shards.values()}
    if counts != {len(shards)}:
        raise AdapterError(
            f"adapter {folder} has {len(shards)} parts of {max(counts)}",
            expected="all parts",
            remedy="Copy the folder again, whole.",
        )
    try:
        names = [name for path in shards for name in read_header(path)]
    except (CorruptFileError, OSError) as error:
        raise AdapterError(
            f"a part of adapter {folder} is damaged: {error}", remedy="Copy the folder again, whole."
        ) from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise AdapterError(f"adapter {folder} has {twice} in two parts", expected="each tensor once")
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True)
    if (folder / CONFIG).is_file():
        shutil.copyfile(folder / CONFIG, out / CONFIG)
    tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out
