"""Weights of other tools' checkpoints, dequantised: equal to what the tool's own library, or the formula, says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.agents import RecipeError
from metier.specializers.checkpoints.checkpoint_files import CheckpointReader
from metier.specializers.checkpoints.dense_model import load_dense_model
from metier.specializers.checkpoints.stored_weights import dense_names, quantised_layers, read_dense, rounds_inputs
from metier.specializers.checkpoints.tensor_files import base_tensors
from tests.quantised_elsewhere import KINDS, write_quantised


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_weights_are_the_tools_own(tmp_path: Path, tiny_family: Callable[[str], Path], kind: str) -> None:
    base = tiny_family("qwen3")
    dense = write_quantised(base, tmp_path / "q", kind)
    reader = CheckpointReader(tmp_path / "q")
    assert quantised_layers(reader) == set(dense)
    assert dense_names(reader) == sorted(CheckpointReader(base).tensors)
    shown = base_tensors(tmp_path / "q")
    source = load_file(base / "model.safetensors")
    for layer, weight in dense.items():
        found = read_dense(reader, f"{layer}.weight", torch.float32)
        # Libraries round scales and products to types of their own.
        assert (found - weight).abs().max() <= 1e-2 * weight.abs().max(), layer
        assert (found - source[f"{layer}.weight"]).norm() < 0.2 * weight.norm(), layer
        assert shown[f"{layer}.weight"].shape == weight.shape
        assert rounds_inputs(reader, layer) == kind.startswith("int8")
    row = torch.tensor([list(range(40, 60))])
    model, plain = load_dense_model(tmp_path / "q", torch.float32), load_dense_model(base, torch.float32)
    with torch.no_grad():
        assert 0 < (model(row).logits - plain(row).logits).abs().mean() < 2


def test_scales_of_blocks_that_do_not_divide(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    write_quantised(tiny_family("qwen3"), tmp_path / "q", "fp8")
    path = tmp_path / "q" / "model.safetensors"
    tensors, name = load_file(path), "model.layers.0.mlp.up_proj"  # [128, 64]
    scale = torch.rand(3, 2) + 0.5
    tensors[f"{name}.weight_scale_inv"] = scale
    del tensors[f"{name}.weight_scale"]
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [48, 40]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    found = read_dense(CheckpointReader(tmp_path / "q"), f"{name}.weight", torch.float32)
    stored = tensors[f"{name}.weight"].float()
    for row, column in ((0, 0), (47, 39), (48, 40), (127, 63), (95, 63)):
        assert found[row, column] == stored[row, column] * scale[row // 48, column // 40]


def test_inputs_in_groups_out_of_order(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    write_quantised(tiny_family("qwen3"), tmp_path / "q", "gptq")
    path = tmp_path / "q" / "model.safetensors"
    tensors, name = load_file(path), "model.layers.0.mlp.up_proj"
    before = read_dense(CheckpointReader(tmp_path / "q"), f"{name}.weight", torch.float32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(torch.int32) % 2
    tensors[f"{name}.g_idx"] = order
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_dense(CheckpointReader(tmp_path / "q"), f"{name}.weight", torch.float32)
    scales = tensors[f"{name}.scales"].float()
    for row, column in ((0, 0), (3, 40), (127, 63)):
        integer = before[row, column] / scales[column // 32, row]
        assert found[row, column] == pytest.approx(float(integer * scales[int(order[column]), row]), rel=1e-4, abs=1e-6)


def test_unknown_ways_of_storing_are_refused(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    write_quantised(tiny_family("qwen3"), tmp_path / "q", "int8-channel")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="quantised by 'bitsandbytes'.*compressed-tensors, fp8, gptq, awq"):
        load_dense_model(tmp_path / "q", torch.float32)
