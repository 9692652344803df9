"""Adapters from elsewhere get onto the shelf checked, and T-REX variants become LoRA variants with lineage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.agents import AdapterError, Message, TrafficRow, UnknownVariantError, VariantError
from metier.specializers import Shelf, check_variant
from metier.specializers.adapters.adoption import adopt_adapter
from metier.specializers.methods.trex.export import export_as_lora
from tests.specializers.adapters.test_adapter_conversion import write_adapter
from tests.tiny_model import write_random_lora, write_tiny_llama
from tests.tiny_trex import TASKS, write_random_trex


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


def left_over(shelf: Shelf) -> list[Path]:
    return list((shelf.folder / ".work").glob("*"))


def test_lora_and_trex_folders_are_taken_as_they_are(tmp_path: Path, tiny_base: Path, shelf: Shelf) -> None:
    lora = write_random_lora(tmp_path / "lora", tiny_base, rank=4)
    (lora / "optimizer.pt").write_bytes(b"not taken")
    trex = write_random_trex(tmp_path / "trex", tiny_base, r1=2, r2=4)
    for folder, kind, rank in ((lora, "lora", 4), (trex, "trex", 10)):
        variant = adopt_adapter(folder, name=kind, shelf=shelf, base=tiny_base)
        assert (variant.ask.adapter, variant.ask.rank, variant.parent) == (kind, rank, None)
        assert variant.recipe == {"methods": [{"method": "adopted", "peft_type": kind.upper()}]}
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (shelf.path(variant) / "adapter" / file).read_bytes() == (folder / file).read_bytes()
        assert len(variant.files) == 2
        shelf.verify(variant)
        check_variant(variant, shelf.path(variant), tiny_base, slot_rank=16)
    assert not left_over(shelf)


def test_weights_in_several_files_are_taken_as_one(tmp_path: Path, tiny_base: Path, shelf: Shelf) -> None:
    lora = write_random_lora(tmp_path / "lora", tiny_base, rank=4)
    whole = adopt_adapter(lora, name="whole", shelf=shelf, base=tiny_base)
    tensors = load_file(lora / "adapter_model.safetensors")
    (lora / "adapter_model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:]), 1):
        save_file({name: tensors[name] for name in part}, lora / f"adapter_model-0000{number}-of-00002.safetensors")
    variant = adopt_adapter(lora, name="parts", shelf=shelf, base=tiny_base)
    found, expected = (load_file(shelf.path(v) / "adapter" / "adapter_model.safetensors") for v in (variant, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    (lora / "adapter_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(AdapterError, match="has 1 parts of 2"):
        adopt_adapter(lora, name="half", shelf=shelf, base=tiny_base)
    assert not left_over(shelf)


def test_a_convertible_adapter_says_what_it_was_and_what_it_lost(tmp_path: Path, tiny_base: Path, shelf: Shelf) -> None:
    adapter = write_adapter(tmp_path / "vera", tiny_base, "VERA", r=4)
    exact = adopt_adapter(adapter, name="exact", shelf=shelf, base=tiny_base)
    assert (exact.ask.adapter, exact.ask.rank) == ("lora", 4)
    (method,) = exact.recipe["methods"]
    assert (method["method"], method["peft_type"]) == ("converted", "VERA") and len(method["sha256"]) == 64
    assert exact.card["conversion"]["exact"] and exact.card["lost_share"] < 1e-3
    lossy = adopt_adapter(adapter, name="lossy", shelf=shelf, base=tiny_base, max_rank=2, accept_error=1.0)
    assert lossy.ask.rank == 2 and not lossy.card["conversion"]["exact"]
    assert lossy.card["conversion"]["exact_rank"] == 4 and lossy.card["lost_share"] > 0.01
    check_variant(lossy, shelf.path(lossy), tiny_base, slot_rank=8)


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, tiny_base: Path, shelf: Shelf) -> None:
    ia3 = write_adapter(tmp_path / "ia3", tiny_base, "IA3", feedforward_modules=["down_proj"])
    wide = write_random_lora(tmp_path / "lora", write_tiny_llama(tmp_path / "wide", hidden=96), rank=4)
    vera = write_adapter(tmp_path / "vera", tiny_base, "VERA", r=4)
    for folder, says in ((ia3, "cannot be served"), (wide, "on base tiny"), (tmp_path, "lacks adapter_config.json")):
        with pytest.raises(AdapterError, match=says):
            adopt_adapter(folder, name="it", shelf=shelf, base=tiny_base)
    with pytest.raises(AdapterError, match="--accept-error"):
        adopt_adapter(vera, name="it", shelf=shelf, base=tiny_base, max_rank=2)
    with pytest.raises(VariantError, match="name 'No Name'"):
        adopt_adapter(vera, name="No Name", shelf=shelf, base=tiny_base)
    assert shelf.list() == [] and not left_over(shelf)


def test_an_exported_variant_is_taken_whole_and_keeps_its_id(tmp_path: Path, tiny_base: Path, shelf: Shelf) -> None:
    lora = write_random_lora(tmp_path / "lora", tiny_base, rank=4)
    author = Shelf(tmp_path / "author")
    variant = author.annotate(adopt_adapter(lora, name="solver", shelf=author, base=tiny_base), {"score": 0.5})
    folder = author.export(variant, tmp_path / "sent")
    taken = adopt_adapter(folder, name="theirs", shelf=shelf, base=tiny_base)
    assert (taken.id, taken.name, taken.card) == (variant.id, "theirs", {"score": 0.5})
    shelf.verify(taken)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(VariantError, match=r"adapter/adapter_config\.json is not what its record says"):
        adopt_adapter(folder, name="theirs", shelf=shelf, base=tiny_base)
    elsewhere = {**json.loads((author.path(variant) / "variant.json").read_text())}
    elsewhere["engine"]["weights"] = "0" * 16
    (author.path(variant) / "variant.json").write_text(json.dumps(elsewhere))
    with pytest.raises(UnknownVariantError, match="0000000000000000"):
        adopt_adapter(author.path(variant), name="theirs", shelf=shelf, base=tiny_base)


def test_a_trex_variant_becomes_one_lora_variant_per_cluster(tmp_path: Path, tiny_base: Path, shelf: Shelf) -> None:
    rows = [
        TrafficRow(role="solver", messages=(Message(role="user", content=text),), reply="Yes.", task=text)
        for text in TASKS
    ]
    parent = adopt_adapter(
        write_random_trex(tmp_path / "trex", tiny_base, r1=2, r2=2), name="all", shelf=shelf, base=tiny_base
    )
    made = list(export_as_lora("all", rows, shelf=shelf, base=tiny_base))
    assert 1 < len(made) <= 4
    for variant, done in made:
        assert shelf.get(f"all-cluster-{done.cluster:02d}") == variant
        assert (variant.parent, variant.ask.adapter, variant.ask.rank) == (parent.id, "lora", 2)
        assert variant.recipe["methods"][0]["cluster"] == done.cluster and variant.data
        assert variant.card["kl_nats"] == pytest.approx(done.error.kl_nats, rel=1e-3)
        assert set(variant.card["frozen_gate"]["answer_loss"]) == {"token_gate", "frozen", "base"}
        shelf.verify(variant)
        check_variant(variant, shelf.path(variant), tiny_base, slot_rank=8)
    assert not left_over(shelf)
    with pytest.raises(VariantError, match=r"has lora adapter; expected a T-REX adapter"):
        next(export_as_lora(made[0][0].name, rows, shelf=shelf, base=tiny_base))
