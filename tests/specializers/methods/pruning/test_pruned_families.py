"""Pruned checkpoints of every family are the base without what was dropped, and what cannot be pruned is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metier.agents import RecipeError, TrafficRow, write_traffic
from metier.agents.errors import TrainingError
from metier.specializers import Recipe, Shelf, produce
from metier.specializers.checkpoints.prunable_models import FAMILIES as PRUNABLE
from metier.specializers.checkpoints.prunable_models import read_prunable
from metier.specializers.methods.pruning import pruned_check
from tests.tiny_families import FAMILIES, write_tiny_family

NAMES = [name for name, config in FAMILIES.items() if config["model_type"] in PRUNABLE]
TOKENS = torch.tensor([[3, 41, 7, 19, 2, 60, 33, 5, 5, 11, 12, 90, 100, 101, 8, 7, 61, 62, 63, 64, 2, 2, 9]])
LAYERS, KEPT_LAYERS = 4, [0, 2, 3]


def make(folder: Path, base: Path, rows: list[TrafficRow], **method: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_traffic(folder / "rows.jsonl", rows)
    fields = {"name": "small", "data": {"traffic": "rows.jsonl"}, "methods": [method], "folder": folder}
    on = Shelf(folder / "shelf")
    variant = produce(Recipe.model_validate(fields), shelf=on, base=base)
    return on.path(variant) / "weights"


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", NAMES)
def test_narrower_mlps_of_every_family(tmp_path: Path, rows: list[TrafficRow], family: str) -> None:
    base = write_tiny_family(tmp_path / "base", family)
    weights = make(tmp_path, base, rows, method="width_pruning", intermediate_size=96)
    model = load(base)
    for block in model.model.layers:  # the oracle: the base with the lowest neurons silenced
        down = block.mlp.down_proj.weight
        if hasattr(block.mlp, "gate_up_proj"):
            fused = block.mlp.gate_up_proj.weight
            halves = (fused[: len(fused) // 2], fused[len(fused) // 2 :])
        else:
            halves = (block.mlp.gate_proj.weight, block.mlp.up_proj.weight)
        values = halves[0].abs().amax(1) + halves[1].abs().amax(1)
        down.data[:, values.argsort()[: 128 - 96]] = 0
    with torch.no_grad():
        torch.testing.assert_close(load(weights)(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", NAMES)
def test_fewer_blocks_of_every_family(tmp_path: Path, rows: list[TrafficRow], family: str) -> None:
    """The oracle keeps all blocks; the dropped one's outputs are zeroed, or its post-norms' gains are."""
    base = write_tiny_family(tmp_path / "base", family)
    weights = make(tmp_path, base, rows, method="depth_pruning", layers=3, score="loss", calibration_rows=4)
    pruned, model = load(weights), load(base)
    kept = [
        next(i for i, b in enumerate(model.model.layers) if torch.equal(b.mlp.down_proj.weight, c.mlp.down_proj.weight))
        for c in pruned.model.layers
    ]
    (dropped,) = set(range(LAYERS)) - set(kept)
    block, facts = model.model.layers[dropped], read_prunable(base).family
    for name in facts.post_norms:
        block.get_submodule(name).weight.data.fill_(-facts.norm_offset)
    for writer in () if facts.post_norms else (block.self_attn.o_proj, block.mlp.down_proj):
        writer.weight.data.zero_()
        if writer.bias is not None:
            writer.bias.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(pruned(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "granite", "qwen2"])
def test_pat_of_families_that_differ(tmp_path: Path, rows: list[TrafficRow], family: str) -> None:
    base = write_tiny_family(tmp_path / "base", family)
    weights = make(
        tmp_path, base, rows, method="pat", hidden_size=32, steps=6, batch_rows=2, lora_rank=2, operator_rank=2,
        calibration_rows=2,
    )  # fmt: skip
    with torch.no_grad():
        assert bool(load(weights)(TOKENS).logits.isfinite().all())
    assert read_prunable(weights).hidden_size == 32


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NAMES)))
@pytest.mark.parametrize("method", ["width_pruning", "depth_pruning"])
def test_other_families_are_refused_before_anything_runs(
    tmp_path: Path, rows: list[TrafficRow], family: str, method: str
) -> None:
    base = write_tiny_family(tmp_path / "base", family)
    with pytest.raises(RecipeError, match="the model is of type"):
        make(tmp_path, base, rows, method=method, **({"layers": 3} if "depth" in method else {"intermediate_size": 96}))


def test_what_a_merge_would_not_know_is_refused(tmp_path: Path, rows: list[TrafficRow]) -> None:
    pat = {"method": "pat", "steps": 6}
    gemma = write_tiny_family(tmp_path / "gemma", "gemma2")
    with pytest.raises(RecipeError, match="embedding_operator: mask_only"):
        make(tmp_path, gemma, rows, hidden_size=32, embedding_operator="trained", **pat)
    windowed = write_tiny_family(
        tmp_path / "qwen", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2
    )
    with pytest.raises(RecipeError, match="use_sliding_window"):
        make(tmp_path, windowed, rows, hidden_size=32, **pat)


def test_a_pruned_model_that_computes_something_else_is_not_written(
    tmp_path: Path, rows: list[TrafficRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruned_check, "TOLERANCE", -1.0)
    base = write_tiny_family(tmp_path / "base", "llama")
    with pytest.raises(TrainingError, match="pruning does not know"):
        make(tmp_path, base, rows, method="width_pruning", intermediate_size=96)
    assert not list((tmp_path / "shelf").glob("*/weights"))
