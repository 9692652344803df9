"""LoRA folders as other tools write them are mended when they are added, and compute what they computed there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.agents import AdapterError
from metier.specializers import Shelf, check_adapter
from metier.specializers.adapters.adapter_mending import mended_names
from metier.specializers.adapters.adoption import adopt_adapter
from metier.specializers.checkpoints.tensor_files import TensorInfo
from tests.specializers.adapters.adapter_forms import Form, lora_forms, peft_logits, write_form
from tests.specializers.adapters.test_adapter_check import change_config, change_tensors
from tests.tiny_model import write_random_lora

FOREIGN: dict[str, Callable[[str], str]] = {
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "no model at all": lambda name: name.removeprefix("base_model.model.model."),
    "a prefix twice": lambda name: f"base_model.model.{name}",
    ".default.": lambda name: name.replace(".weight", ".default.weight"),
    "an adapter's name": lambda name: name.replace(".weight", ".solver.weight"),
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled layers": lambda name: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name),
    "FSDP": lambda name: re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.", f"_fsdp_wrapped_module.{name}"),
    "checkpointed": lambda name: re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", name),
    "DDP": lambda name: f"module.{name}",
    "vision and language": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "language outside": lambda name: name.replace("model.layers", "language_model.model.layers"),
}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


def rename(tensors: dict[str, Any], new: Callable[[str], str]) -> None:
    renamed = {new(name): value for name, value in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


@pytest.mark.parametrize("wrote", FOREIGN)
def test_names_of_other_tools_are_mended(tmp_path: Path, tiny_base: Path, shelf: Shelf, wrote: str) -> None:
    adapter = write_random_lora(tmp_path / "adapter", tiny_base, rank=4)
    expected = peft_logits(tiny_base, adapter)
    change_tensors(adapter, lambda tensors: rename(tensors, FOREIGN[wrote]))
    with pytest.raises(AdapterError):
        check_adapter(adapter, tiny_base, slot_rank=8)
    variant = adopt_adapter(adapter, name="mended", shelf=shelf, base=tiny_base)
    (method,) = variant.recipe["methods"]
    assert method["mended"] == ["names of tensors"] and len(method["sha256"]) == 64
    assert torch.equal(peft_logits(tiny_base, shelf.path(variant) / "adapter"), expected)


def test_ranks_and_scalings_stay_those_of_the_names_it_was_trained_with(
    tmp_path: Path, tiny_base: Path, shelf: Shelf
) -> None:
    form = Form("both", "served", {"rank_pattern": {"model.layers.1.mlp.up_proj": 3}, "alpha_pattern": {"q_proj": 64}})
    adapter = write_form(tmp_path / "adapter", tiny_base, form)
    expected = peft_logits(tiny_base, adapter)
    inside = FOREIGN["vision and language"]
    change_tensors(adapter, lambda tensors: rename(tensors, inside))
    config = json.loads((adapter / "adapter_config.json").read_text())
    change_config(
        adapter,
        rank_pattern={inside(name): rank for name, rank in config["rank_pattern"].items()},
        target_modules=r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+",
    )
    variant = adopt_adapter(adapter, name="mended", shelf=shelf, base=tiny_base)
    assert torch.equal(peft_logits(tiny_base, shelf.path(variant) / "adapter"), expected)


@pytest.mark.parametrize("name", ["VeLoRA", "MonteCLoRA"])
def test_what_only_training_uses_is_left_out(tmp_path: Path, tiny_base: Path, shelf: Shelf, name: str) -> None:
    form = next(form for form in lora_forms() if form.name == name)
    adapter = write_form(tmp_path / "adapter", tiny_base, form)
    variant = adopt_adapter(adapter, name="mended", shelf=shelf, base=tiny_base)
    assert variant.recipe["methods"][0]["mended"] == ["tensors of training"]
    found = peft_logits(tiny_base, shelf.path(variant) / "adapter")
    torch.testing.assert_close(found, peft_logits(tiny_base, adapter), atol=1e-5, rtol=0)


def test_a_copy_of_the_bases_embedding_is_left_out_and_a_trained_one_is_not_lost(
    tmp_path: Path, tiny_base: Path, shelf: Shelf
) -> None:
    form = next(form for form in lora_forms() if form.name == "embedding as target")
    adapter = write_form(tmp_path / "adapter", tiny_base, form)
    held = "base_model.model.model.embed_tokens.base_layer.weight"

    def add_copy(tensors: dict[str, Any]) -> None:
        tensors[held] = base_embedding(tiny_base)

    change_tensors(adapter, add_copy)
    variant = adopt_adapter(adapter, name="mended", shelf=shelf, base=tiny_base)
    assert variant.recipe["methods"][0]["mended"] == ["copies of the base's weights"]
    change_tensors(adapter, lambda tensors: tensors[held][7].add_(0.5))
    with pytest.raises(AdapterError, match=r"embed_tokens\.base_layer\.weight' is not what base tiny has.*merge"):
        adopt_adapter(adapter, name="mended", shelf=shelf, base=tiny_base)


def base_embedding(base: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()


def test_two_adapters_in_one_file_are_refused(tmp_path: Path, tiny_base: Path, shelf: Shelf) -> None:
    adapter = write_random_lora(tmp_path / "adapter", tiny_base, rank=4)

    def double(tensors: dict[str, Any]) -> None:
        tensors.update({name.replace(".weight", ".second.weight"): value + 0 for name, value in tensors.items()})

    change_tensors(adapter, double)
    with pytest.raises(AdapterError, match="holds two adapters for some layers") as refused:
        adopt_adapter(adapter, name="it", shelf=shelf, base=tiny_base)
    assert str(adapter) in str(refused.value)
    assert shelf.list() == []


def test_names_fit_a_base_with_a_vision_part_too() -> None:
    some = TensorInfo("F32", (4, 4), 0, 64)
    text, vision = "language_model.model.layers.0.mlp.up_proj", "vision_tower.encoder.layers.0.mlp.up_proj"
    layers = {f"{text}.weight": some, f"{vision}.weight": some}
    mended = mended_names(
        ["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", f"{vision}.lora_A.default.weight", "surprise"],
        layers,
    )
    assert list(mended.values()) == [
        f"base_model.model.{text}.lora_A.weight",
        f"base_model.model.{vision}.lora_A.weight",
        "surprise",
    ]
