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
from tests.tiny_families import write_tiny_family


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"model": 3}', b"[" * 9000])
def test_a_damaged_tokenizer_is_named(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(BaseModelError, match=rf"cannot open the tokenizer in {folder}: ."):
        open_tokenizer(folder)


def test_weights_that_would_be_drawn_at_random_are_named(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(BaseModelError, match=rf"checkpoint in {folder} lacks 9 tensors of its model, model.layers.2"):
        open_model(folder, dtype=torch.float32)


def test_a_model_that_reads_in_both_directions_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 64}))
    with pytest.raises(BaseModelError, match="of type 'bert', reads texts in both directions; expected a causal"):
        open_model(folder, dtype=torch.float32)


def test_what_is_wrong_with_a_config_is_said_behind_its_heading(tmp_path: Path) -> None:
    folder = write_tiny_family(tmp_path, "qwen3")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 6}))
    with pytest.raises(BaseModelError, match="'validate_layer_type': .*layer_types"):
        open_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("changes", [{"model_type": "none"}, {"hidden_size": "x"}, {"num_hidden_layers": None}])
def test_a_config_that_means_no_model_is_named(folder: Path, changes: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(BaseModelError, match=rf"cannot open the (config|model) in {folder}: ."):
        open_model(folder, dtype=torch.float32)
    with pytest.raises(BaseModelError, match=rf"cannot open the (config|model) in {folder}: ."):
        load_dense_model(folder, torch.float32)
