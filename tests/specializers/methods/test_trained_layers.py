"""Which linear layers get an update: those that peft trains as they are named, and engines take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from metier.agents.errors import RecipeError
from metier.specializers.methods.adapter_training import served_targets
from metier.specializers.methods.trained import add_lora, linear_targets
from tests.tiny_families import write_tiny_family

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]


def model_of(folder: Path, family: str, **changes: Any) -> Any:
    write_tiny_family(folder, family, **changes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_layers_named_as_experts_are_left_alone(tmp_path: Path) -> None:
    """peft would train the experts instead, whose adapters no engine on a CPU takes."""
    model = model_of(tmp_path, "qwen3_moe", mlp_only_layers=[0])
    assert isinstance(model.model.layers[0].mlp.gate_proj, torch.nn.Linear)
    assert linear_targets(model, "all-linear") == ATTENTION
    with pytest.raises(RecipeError, match=r"targets \['gate_proj'\] name no linear layer .*k_proj, o_proj"):
        linear_targets(model, ("q_proj", "gate_proj"))
    tuned = add_lora(model, rank=2, alpha=2.0, dropout=0.1, targets=linear_targets(model, "all-linear"), seed=0)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained and all(".self_attn." in name for name in trained)


def test_layers_beside_experts_are_left_alone(tmp_path: Path) -> None:
    sizes = {"shared_expert_intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 4}
    config = AutoConfig.for_model("qwen2_moe", hidden_size=64, num_hidden_layers=2, num_attention_heads=2, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.get_submodule("model.layers.0.mlp.shared_expert_gate")
    assert linear_targets(model, "all-linear") == ATTENTION


def test_the_way_out_of_a_mamba_layer_is_left_alone(tmp_path: Path) -> None:
    """Its kernels read that weight themselves; a delta rule's way out is a layer like others."""
    for family, adapted in (("falcon_h1", False), ("granitemoehybrid", False), ("qwen3_5", True), ("lfm2", True)):
        targets = linear_targets(model_of(tmp_path / family, family), "all-linear")
        assert ("out_proj" in targets) == adapted and {"q_proj", "v_proj"} < set(targets)


def test_adapters_leave_out_what_the_engine_has_in_parts(tmp_path: Path) -> None:
    model = model_of(tmp_path, "glm4")
    assert set(linear_targets(model, "all-linear")) - set(served_targets(model, "all-linear")) == {"gate_up_proj"}
