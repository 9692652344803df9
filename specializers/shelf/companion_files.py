"""What an engine opens beside a checkpoint's weights: tokenizer, chat template, settings of generation."""

from __future__ import annotations

import shutil
from pathlib import Path

from .bundled_model import MANIFEST

__all__ = ["add_companions"]

# A checkpoint's own files; whatever else lies beside them goes with every variant of it.
_OWN_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf", MANIFEST)


def add_companions(model: Path, weights: Path) -> None:
    """Copy the companions of the checkpoint in `model` to `weights`, but for those that are there."""
    for path in sorted(model.iterdir()):
        if path.is_file() and not path.name.endswith(_OWN_FILES) and not (weights / path.name).exists():
            shutil.copyfile(path, weights / path.name)
