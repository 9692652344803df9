"""Mixtures of experts: what adapters may touch there, from the checkpoint's own names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from metier.agents.errors import AdapterError
from metier.specializers.adapters.adapter_check import check_adapter
from metier.specializers.checkpoints.expert_layers import adaptable_names, mixtures
from metier.specializers.checkpoints.tensor_files import base_tensors
from tests.tiny_families import write_tiny_family
from tests.tiny_model import write_random_lora

MIXTURES = {"qwen3_moe": "mlp", "mixtral": "block_sparse_moe", "olmoe": "mlp"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_of_attention_pass_and_those_of_experts_are_refused(tmp_path: Path, family: str) -> None:
    base = write_tiny_family(tmp_path / "base", family)
    layers = base_tensors(base)
    assert mixtures(layers) == {f"model.layers.{layer}.{MIXTURES[family]}" for layer in range(4)}
    assert adaptable_names(layers) == sorted((*ATTENTION, "embed_tokens", "lm_head"))
    folder = write_random_lora(tmp_path / "lora", base, targets=ATTENTION)
    assert check_adapter(folder, base, slot_rank=8).rank == 8
    experts = [name.removesuffix(".weight") for name in layers if ".experts.0." in name]
    for module in {experts[0], f"model.layers.0.{MIXTURES[family]}.gate", "model.layers.0.mlp.gate"}:
        with pytest.raises(AdapterError, match=r"is an expert of base.*or chooses among them.*q_proj"):
            check_adapter(_adapter_of(tmp_path / module, module), base, slot_rank=8)


def test_a_model_without_experts_leaves_all_layers_to_the_engine(tmp_path: Path) -> None:
    assert adaptable_names(base_tensors(write_tiny_family(tmp_path, "llama"))) is None


def _adapter_of(folder: Path, module: str) -> Path:
    folder.mkdir()
    halves = {"lora_A": torch.randn(2, 64), "lora_B": torch.randn(64, 2)}
    save_file(
        {f"base_model.model.{module}.{half}.weight": tensor for half, tensor in halves.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
