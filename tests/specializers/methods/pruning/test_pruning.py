"""Training-free pruning, width and depth: scores against loops; pruned checkpoints are the slices they claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.agents import RecipeError, TrafficRow, write_traffic
from metier.specializers import Recipe, Shelf, produce
from metier.specializers.methods.pruning.depth import block_importance, renumber
from metier.specializers.methods.pruning.width import activation_scores, keep_neurons, maw_scores
from tests.tiny_model import write_tiny_llama

LAYERS, WIDTH, KEPT = 5, 128, 96


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", layers=LAYERS, intermediate=WIDTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[TrafficRow]) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    write_traffic(place / "rows.jsonl", rows)
    return place


def make(folder: Path, base: Path, shelf: Path, **method: Any) -> tuple[Any, Path]:
    fields = {"name": "small", "data": {"traffic": "rows.jsonl"}, "methods": [method], "folder": folder}
    on = Shelf(shelf)
    variant = produce(Recipe.model_validate(fields), shelf=on, base=base)
    return variant, on.path(variant) / "weights"


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_scores_are_those_of_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)
    down, square = torch.randn(5, 7, generator=generator), torch.rand(7, generator=generator)
    for neuron in range(7):
        highest = max(abs(w) for w in gate[neuron].tolist()) + max(abs(w) for w in up[neuron].tolist())
        assert float(maw_scores(gate, up)[neuron]) == pytest.approx(highest)
        adds = (float(square[neuron]) * sum(w * w for w in down[:, neuron].tolist())) ** 0.5
        assert float(activation_scores(square, down)[neuron]) == pytest.approx(adds, rel=1e-5)
    assert keep_neurons(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    for token in range(4):
        expected = -float((x[token] @ y[token]) / (x[token].norm() * y[token].norm()))
        assert float(block_importance(x, y)[token]) == pytest.approx(expected, rel=1e-5)
    assert renumber("model.layers.3.mlp.up_proj.weight", [0, 3]) == "model.layers.1.mlp.up_proj.weight"
    assert renumber("model.layers.2.mlp.up_proj.weight", [0, 3]) is None
    assert renumber("model.norm.weight", [0, 3]) == "model.norm.weight"


@pytest.mark.parametrize("score", ["maw", "activation", "random"])
def test_a_narrower_mlp_is_the_base_without_its_lowest_neurons(
    tmp_path: Path, folder: Path, base: Path, score: str
) -> None:
    variant, weights = make(folder, base, tmp_path, method="width_pruning", intermediate_size=KEPT, score=score)
    assert variant.card["intermediate_size"] == KEPT and variant.card["score"] == score
    assert variant.card["parameters"] < 117_000 * LAYERS
    tokens = torch.tensor([[3, 41, 7, 19, 2]])
    model, pruned = load(base), load(weights)
    squares = _mean_squares(model, folder, base) if score == "activation" else None
    for layer, block in enumerate(model.model.layers):  # the oracle: the base with those neurons silenced
        mlp = block.mlp
        if score == "maw":
            values = mlp.gate_proj.weight.abs().amax(1) + mlp.up_proj.weight.abs().amax(1)
        elif squares is not None:
            values = squares[layer].sqrt() * mlp.down_proj.weight.norm(dim=0)
        else:
            kept_rows = {tuple(row) for row in pruned.model.layers[layer].mlp.gate_proj.weight.tolist()}
            values = torch.tensor([float(tuple(row) in kept_rows) for row in mlp.gate_proj.weight.tolist()])
        lowest = values.argsort()[: WIDTH - KEPT]
        mlp.down_proj.weight.data[:, lowest] = 0
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def _mean_squares(model: Any, folder: Path, base: Path) -> list[torch.Tensor]:
    """Mean squares of all neurons, from activations that are kept and stacked."""
    from transformers import AutoTokenizer

    from metier.specializers.methods.calibration import sample_rows
    from metier.specializers.recipes.recipe import read_rows
    from metier.specializers.training.batches import encode_rows

    fields = {
        "name": "a",
        "data": {"traffic": "rows.jsonl"},
        "methods": [{"method": "depth_pruning", "layers": 1}],
        "folder": folder,
    }
    rows = read_rows(Recipe.model_validate(fields))
    drawn = sample_rows(rows, count=32, seed=0)
    chosen = encode_rows(drawn, AutoTokenizer.from_pretrained(base), max_row_tokens=200)
    assert len(chosen) == 32
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(lambda _, x, kept=seen[layer]: kept.append(x[0][0]))
    with torch.no_grad():
        for row in chosen:
            model(torch.tensor([row.tokens]))
    return [torch.cat(kept).square().mean(0) for kept in seen]


@pytest.mark.parametrize("score", ["cosine", "loss", "random"])
def test_a_shallower_model_is_the_base_without_those_blocks(
    tmp_path: Path, folder: Path, base: Path, score: str
) -> None:
    variant, weights = make(folder, base, tmp_path, method="depth_pruning", layers=3, score=score)
    dropped = variant.card["dropped"]
    assert len(dropped) == 2 and variant.card["layers"] == 3
    model = load(base)
    kept = [block for layer, block in enumerate(model.model.layers) if layer not in dropped]
    for number, block in enumerate(kept):
        block.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = 3
    tokens = torch.tensor([[3, 41, 7, 19, 2]])
    with torch.no_grad():
        torch.testing.assert_close(load(weights)(tokens).logits, model(tokens).logits)


def test_a_block_that_does_nothing_goes_first(tmp_path: Path, folder: Path, base: Path) -> None:
    model = load(base)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(name).weight.zero_()
    idle = tmp_path / "idle"
    for path in base.iterdir():
        (idle).mkdir(exist_ok=True)
        (idle / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(idle)
    for score in ("cosine", "loss"):
        variant, _ = make(folder, idle, tmp_path / score, method="depth_pruning", layers=4, score=score)
        if score == "cosine":
            assert variant.card["dropped"] == [2]
    tokens = torch.tensor([[3, 41, 7, 19, 2]])
    with torch.no_grad():
        pruned = load(Shelf(tmp_path / "cosine").path(Shelf(tmp_path / "cosine").list()[0]) / "weights")
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_pruning_steps_follow_each_other(tmp_path: Path, folder: Path, base: Path) -> None:
    fields = {
        "name": "smaller",
        "data": {"traffic": "rows.jsonl"},
        "methods": [
            {"method": "depth_pruning", "layers": 4},
            {"method": "width_pruning", "intermediate_size": 64},
            {
                "method": "pat",
                "hidden_size": 48,
                "steps": 4,
                "batch_rows": 4,
                "warmup_steps": 1,
                "milestone_share": 0.5,
                "lora_rank": 2,
                "operator_rank": 2,
                "dtype": "float32",
            },
        ],
        "folder": folder,
    }
    shelf = Shelf(tmp_path)
    variant = produce(Recipe.model_validate(fields), shelf=shelf, base=base)
    config = json.loads((shelf.path(variant) / "weights" / "config.json").read_text())
    assert [config[key] for key in ("num_hidden_layers", "intermediate_size", "hidden_size")] == [4, 64, 48]
    assert [stage["method"] for stage in variant.card["stages"]] == ["depth_pruning", "width_pruning", "pat"]


def test_weights_alone_need_no_rows_and_activations_do(tmp_path: Path, base: Path) -> None:
    method = {"method": "width_pruning", "intermediate_size": KEPT}
    variant = produce(Recipe.model_validate({"name": "small", "methods": [method]}), shelf=Shelf(tmp_path), base=base)
    assert variant.card["intermediate_size"] == KEPT
    for needing in ({**method, "score": "activation"}, {"method": "depth_pruning", "layers": 2}):
        with pytest.raises(RecipeError, match="data"):
            Recipe.model_validate({"name": "small", "methods": [needing]})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"method": "depth_pruning", "layers": 5}, r"layers 5 are no fewer than the model's 5.*1 to 4"),
        ({"method": "width_pruning", "intermediate_size": 128}, r"intermediate_size 128 is no smaller than"),
        ({"method": "width_pruning", "intermediate_size": 100}, r"100 is no multiple of 16.*96 or 112"),
        ({"method": "width_pruning", "intermediate_size": 96, "score": "norms"}, r"score: 'norms'"),
        ({"method": "depth_prunin", "layers": 2}, r"Did you mean 'depth_pruning'"),
    ],
)
def test_what_cannot_work_is_said_first(
    tmp_path: Path, folder: Path, base: Path, method: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make(folder, base, tmp_path, **method)
