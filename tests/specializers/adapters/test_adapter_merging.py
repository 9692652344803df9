"""Merged checkpoints compute what peft computes with the adapter, in families that differ; the rest is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metier.agents import AdapterError
from metier.specializers.adapters.adapter_mending import write_mended
from metier.specializers.adapters.adapter_merging import merge_adapter
from metier.specializers.adapters.lora_deltas import LoraDeltas
from metier.specializers.checkpoints.checkpoint_files import CheckpointReader
from metier.specializers.checkpoints.tensor_files import base_tensors
from tests.specializers.adapters.adapter_forms import Form, base_logits, peft_logits, write_form
from tests.specializers.adapters.test_adapter_mending import FOREIGN, change_tensors, rename
from tests.specializers.adapters.test_lora_deltas import peft_merged
from tests.tiny_families import write_tiny_family
from tests.tiny_model import write_tiny_llama

# Norms on queries and keys; scaled embeddings; fused layers; biases; embeddings, residuals and logits multiplied.
FAMILIES = ("qwen3", "gemma3", "phi3", "llama_biased", "granite")
FIRST = {"phi3": "qkv_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_logits_agree_with_peft_in_every_family(tmp_path: Path, family: str) -> None:
    base = write_tiny_family(tmp_path / "base", family)
    first = FIRST.get(family, "q_proj")
    plain = Form(
        "plain",
        "served",
        {"use_rslora": True, "rank_pattern": {f"1.*{first}": 3}, "alpha_pattern": {"down_proj": 5}},
        targets=[first, "o_proj", "down_proj"],
    )
    adapter = write_form(tmp_path / "plain", base, plain)
    deltas, reader, expected = LoraDeltas(adapter, base), CheckpointReader(base), peft_merged(base, adapter)
    for name in reader.tensors:
        torch.testing.assert_close(deltas.add(name, reader.read(name).float()), expected[name], atol=1e-6, rtol=1e-5)
    dora = write_form(tmp_path / "dora", base, Form("DoRA", "merged", {"use_dora": True}, targets=[first, "down_proj"]))
    done = merge_adapter(dora, base, tmp_path / "merged")
    assert not done.untied and done.error.share < 1e-3
    assert base_tensors(tmp_path / "merged").keys() == base_tensors(base).keys()
    torch.testing.assert_close(base_logits(tmp_path / "merged"), peft_logits(base, dora), atol=1e-4, rtol=0)


def test_a_tied_head_is_stored_apart_only_where_it_differs(tmp_path: Path, tiny_base: Path) -> None:
    for saved, untied in (("lm_head", True), ("input_layernorm", False)):
        form = Form("saved", "merged", {"modules_to_save": [saved]})
        adapter = write_form(tmp_path / saved, tiny_base, form)
        done = merge_adapter(adapter, tiny_base, tmp_path / f"merged-{saved}")
        assert done.untied == untied
        assert ("lm_head.weight" in base_tensors(tmp_path / f"merged-{saved}")) == untied
        config = json.loads((tmp_path / f"merged-{saved}" / "config.json").read_text())
        assert config["tie_word_embeddings"] == (not untied)
        assert (tmp_path / f"merged-{saved}" / "tokenizer.json").is_file()


def test_rounding_to_the_bases_format_is_measured(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", dtype="bfloat16")
    adapter = write_form(tmp_path / "dora", base, Form("DoRA", "merged", {"use_dora": True}))
    done = merge_adapter(adapter, base, tmp_path / "merged")
    assert 1e-3 < done.error.share < 0.1
    assert {info.dtype for info in base_tensors(tmp_path / "merged").values()} == {"BF16"}


def test_names_of_other_tools_are_mended_before_merging(tmp_path: Path, tiny_base: Path) -> None:
    adapter = write_form(tmp_path / "dora", tiny_base, Form("DoRA", "merged", {"use_dora": True}))
    expected = peft_logits(tiny_base, adapter)
    change_tensors(adapter, lambda tensors: rename(tensors, FOREIGN["torch.compile"]))
    merge_adapter(adapter, tiny_base, tmp_path / "merged")
    torch.testing.assert_close(base_logits(tmp_path / "merged"), expected, atol=1e-4, rtol=0)


def test_what_cannot_be_merged_is_said_by_name(tmp_path: Path, tiny_base: Path) -> None:
    adapter = write_form(tmp_path / "dora", tiny_base, Form("DoRA", "merged", {"use_dora": True}))
    quantised = write_tiny_llama(tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(AdapterError, match="base quantised is quantised"):
        merge_adapter(adapter, quantised, tmp_path / "merged")
    with pytest.raises(AdapterError, match=rf"peft cannot load the LORA adapter {adapter}: "):
        merge_adapter(adapter, write_tiny_llama(tmp_path / "wide", hidden=96), tmp_path / "merged")
    write_mended(adapter, tmp_path / "less", tiny_base, for_engine=False)
    change_tensors(tmp_path / "less", lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(AdapterError, match="missing adapter keys.*Copy the adapter again"):
        merge_adapter(tmp_path / "less", tiny_base, tmp_path / "merged")
    change_tensors(adapter, lambda tensors: tensors.update({"base_model.model.model.surprise": torch.ones(2)}))
    with pytest.raises(AdapterError, match="peft has no place for .*surprise"):
        merge_adapter(adapter, tiny_base, tmp_path / "merged")
    biased = write_form(tmp_path / "bias", tiny_base, Form("lora_bias", "merged", {"lora_bias": True}))
    with pytest.raises(AdapterError, match="peft cannot merge .* base layer has no bias"):
        merge_adapter(biased, tiny_base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
