"""Quantising the families that differ: what is written is read by others as it was meant, and cards are true."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from metier.agents import RecipeError
from metier.specializers import Recipe, Shelf, produce
from metier.specializers.checkpoints.checkpoint_files import CheckpointReader
from metier.specializers.checkpoints.dense_model import load_dense_model
from metier.specializers.checkpoints.perplexity import offline_text, text_windows
from metier.specializers.checkpoints.quantisers import round_activations
from metier.specializers.checkpoints.stored_weights import quantised_layers
from metier.specializers.checkpoints.written_check import check_written
from tests.tiny_families import FAMILIES_THAT_DIFFER


def quantise(root: Path, base: Path, **settings: Any) -> tuple[dict[str, Any], Path]:
    method = {"method": "ptq", "perplexity_windows": 2, "perplexity_window_tokens": 40, **settings}
    recipe = Recipe.model_validate({"name": "small", "methods": [method], "folder": root})
    shelf = Shelf(root / "shelf")
    variant = produce(recipe, shelf=shelf, base=base)
    return variant.card, shelf.path(variant) / "weights"


def perplexity(model: Any, rows: Iterable[list[int]]) -> float:
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


@pytest.mark.parametrize("name", FAMILIES_THAT_DIFFER)
def test_transformers_reads_the_same_weights_and_the_card_is_true(
    tmp_path: Path, tiny_family: Callable[[str], Path], name: str
) -> None:
    base = tiny_family(name)
    card, weights = quantise(tmp_path, base, scheme="w4a16", group_size=32, overrides={"*.layers.1.*": "w8a8"})
    quantised = quantised_layers(CheckpointReader(weights))
    assert quantised and not any("experts" in layer for layer in quantised)
    windows = text_windows(AutoTokenizer.from_pretrained(base), offline_text()[1], count=2, tokens=40)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    assert card["perplexity_before"] == pytest.approx(perplexity(original, windows), rel=1e-4)
    dense = load_dense_model(weights, torch.float32)
    if name != "qwen3_moe":  # transformers cannot load its experts from a quantised checkpoint
        theirs = AutoModelForCausalLM.from_pretrained(
            weights, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
        read = dict(theirs.named_parameters())
        for place, parameter in dense.named_parameters():
            assert torch.equal(read[place], parameter), place
    for layer in quantised:
        if ".layers.1." in layer:
            module = dense.get_submodule(layer)
            module.register_forward_pre_hook(lambda _m, args: (round_activations(args[0]), *args[1:]))
    assert card["perplexity"] == pytest.approx(perplexity(dense, windows), rel=1e-3)


def test_fused_matrices_are_quantised_and_the_rest_is_named(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    _, weights = quantise(tmp_path, tiny_family("phi3"), ignore=["*.layers.0.*"])
    reader = CheckpointReader(weights)
    assert {layer.rpartition(".")[2] for layer in quantised_layers(reader)} == {
        *("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    }
    settings = reader.config["quantization_config"]
    assert sorted(settings["ignore"]) == sorted(
        ["lm_head", *(f"model.layers.0.{n}" for n in ("self_attn.qkv_proj", "self_attn.o_proj"))]
        + [f"model.layers.0.mlp.{n}" for n in ("gate_up_proj", "down_proj")]
    )
    settings["ignore"].remove("model.layers.0.mlp.down_proj")
    settings["config_groups"]["group_0"]["targets"] = ["Linear"]
    (weights / "config.json").write_text(json.dumps(reader.config))
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.mlp\.down_proj .* would be read as quantised"):
        check_written(weights)
