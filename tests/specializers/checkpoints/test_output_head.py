"""Output heads: whether one is the embedding is read from what is stored, not from what the config says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from metier.specializers import Recipe, Shelf, base_fingerprint, produce
from metier.specializers.checkpoints.dense_checkpoint import dense_tensors, write_dense
from metier.specializers.checkpoints.layer_stream import LayerStream
from metier.specializers.checkpoints.output_head import HEAD, stores_own_head
from metier.specializers.checkpoints.prunable_models import read_prunable

ROW = list(range(40, 70))


def with_head(base: Path, target: Path, change: float, *, at: int | None = None) -> Path:
    """A copy of a tied checkpoint with its head stored too, changed in one row or in all."""
    shutil.copytree(base, target)
    tensors = load_file(target / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    generator = torch.Generator().manual_seed(0)
    noise = change * torch.randn(head.shape, generator=generator)
    head += noise if at is None else noise * (torch.arange(len(head)) == at)[:, None]
    save_file({**tensors, HEAD: head}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ROW]), use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite"])
def test_a_stored_head_that_differs_is_the_models_head(
    tmp_path: Path, tiny_family: Callable[[str], Path], family: str
) -> None:
    base = tiny_family(family)
    copied, trained = with_head(base, tmp_path / "copied", 0.0), with_head(base, tmp_path / "trained", 0.5)
    other = with_head(base, tmp_path / "other", 0.7)
    assert [stores_own_head(folder) for folder in (base, copied, trained)] == [False, False, True]
    prints = [base_fingerprint(folder) for folder in (base, copied, trained, other)]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    assert (logits(trained) - logits(base)).abs().max() > 0.3
    for folder in (base, copied, trained):
        streamed = next(LayerStream(folder).logits([ROW]))
        assert (streamed - logits(folder)).abs().max() < 1e-4


def test_a_head_that_differs_late_is_seen(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    base = tiny_family("qwen3")
    rows = len(load_file(base / "model.safetensors")["model.embed_tokens.weight"])
    assert stores_own_head(with_head(base, tmp_path / "last", 0.5, at=rows - 1))


@pytest.mark.parametrize("change", [0.0, 0.5], ids=["copied", "trained"])
def test_a_checkpoint_written_again_keeps_its_head(
    tmp_path: Path, tiny_family: Callable[[str], Path], change: float
) -> None:
    folder = with_head(tiny_family("qwen3"), tmp_path / "base", change)
    shape = read_prunable(folder)
    assert shape.tied == (not change)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = tmp_path / "again"
    write_dense(again, dense_tensors(model), json.loads((folder / "config.json").read_text()))
    assert (logits(again) - logits(folder)).abs().max() == 0
    assert stores_own_head(again) == bool(change)
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] == (not change)


@pytest.mark.parametrize(
    "method",
    [
        {"method": "depth_pruning", "layers": 3, "score": "random"},
        {"method": "width_pruning", "intermediate_size": 96, "score": "random"},
        {"method": "ptq", "perplexity_windows": 0},
    ],
    ids=lambda method: str(method["method"]),
)
def test_what_is_made_of_a_base_with_its_own_head_keeps_it(
    tmp_path: Path, tiny_family: Callable[[str], Path], method: dict[str, Any]
) -> None:
    """Pruning dropped it, and its logits were 35 nats away."""
    base = with_head(tiny_family("qwen3"), tmp_path / "base", 0.5)
    shelf = Shelf(tmp_path / "shelf")
    made = produce(Recipe.model_validate({"name": "made", "methods": [method]}), shelf=shelf, base=base)
    weights = shelf.path(made) / "weights"
    assert stores_own_head(weights)
    assert torch.equal(load_file(weights / "model.safetensors")[HEAD], load_file(base / "model.safetensors")[HEAD])
    assert not json.loads((weights / "config.json").read_text())["tie_word_embeddings"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for layer in made.card.get("dropped", ()):
        model.model.layers[layer].forward = lambda hidden_states, *args, **kwargs: hidden_states
    if method["method"] == "width_pruning":
        return
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ROW]), use_cache=False).logits[0].log_softmax(-1)
    found = next(LayerStream(weights).logits([ROW])).log_softmax(-1)
    if made.card.get("dropped"):
        assert (found - expected).abs().max() < 1e-4
    else:  # rounding
        assert (found - expected).abs().mean() < 0.5
