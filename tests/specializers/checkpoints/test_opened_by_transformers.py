"""A checkpoint that transformers cannot open is a named error, whatever transformers raises for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from metier.agents.errors import BaseModelError
from metier.specializers.checkpoints.attention import open_model
from metier.specializers.checkpoints.dense_model import load_dense_model
from metier.specializers.checkpoints.opened_by_transformers import open_tokenizer


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"model": 3}', b"[" * 9000])
def test_a_damaged_tokenizer_is_named(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(BaseModelError, match=rf"cannot open the tokenizer in {folder}: ."):
        open_tokenizer(folder)


@pytest.mark.parametrize("changes", [{"model_type": "none"}, {"hidden_size": "x"}, {"num_hidden_layers": None}])
def test_a_config_that_means_no_model_is_named(folder: Path, changes: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(BaseModelError, match=rf"cannot open the (config|model) in {folder}: ."):
        open_model(folder, dtype=torch.float32)
    with pytest.raises(BaseModelError, match=rf"cannot open the (config|model) in {folder}: ."):
        load_dense_model(folder, torch.float32)
