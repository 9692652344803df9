"""Models run layer by layer: each family's own logits, whatever it does around and between its layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from metier.agents import RecipeError
from metier.specializers.checkpoints import layer_stream
from metier.specializers.checkpoints.layer_stream import LayerStream
from tests.tiny_families import FAMILIES, HYBRIDS, write_tiny_family

# Rows of two lengths, longer than the sliding windows; Llama 3 scales positions from 32 on.
ROWS = ([(31 * n) % 257 for n in range(50)], list(range(40, 63)))


def whole(folder: Path, row: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("name", [*FAMILIES, *HYBRIDS])
def test_streamed_logits_are_the_models_own(tiny_family: Callable[[str], Path], name: str) -> None:
    stream = LayerStream(tiny_family(name))
    # Its multipliers stand around the layers: such a model is loaded whole, and gives its own logits too.
    assert stream.exact == (name != "falcon_h1")
    for row, logits in zip(ROWS, stream.logits(ROWS), strict=True):
        expected = whole(tiny_family(name), row)
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max())), name


@pytest.mark.parametrize("name", ["gemma3", "phi3", "qwen3_moe"])
def test_no_layer_stays_in_memory(tiny_family: Callable[[str], Path], name: str) -> None:
    stream = LayerStream(tiny_family(name))
    list(stream.logits(ROWS))
    held = {parameter.device.type for parameter in stream._model.parameters()}
    # Experts are stored one by one and computed together: such a model is loaded by transformers, whole.
    assert held == ({"cpu"} if "moe" in name else {"meta"})


def test_what_is_added_counts_as_part_of_the_weights(tiny_family: Callable[[str], Path]) -> None:
    class Doubled:
        layers = frozenset({"model.layers.1.mlp.up_proj"})

        def add(self, name: str, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2 if name.removesuffix(".weight") in self.layers else weight

    for name in ("qwen3", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(tiny_family(name), dtype=torch.float32).eval()
        changed = Doubled()
        changed.layers = frozenset({"model.layers.1.self_attn.v_proj"})
        with torch.no_grad():
            model.get_submodule("model.layers.1.self_attn.v_proj").weight.mul_(2)
            expected = model(input_ids=torch.tensor([ROWS[0]]), use_cache=False).logits[0]
        found = next(LayerStream(tiny_family(name), changed).logits([ROWS[0]]))
        assert (found - expected).abs().max() < 1e-4


def test_a_family_that_cannot_be_streamed_runs_whole(
    tiny_family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose layers share more than hidden states; the check on a few tokens decides."""
    monkeypatch.setattr(layer_stream, "_streamable", {})
    monkeypatch.setattr(layer_stream, "_MOST_DIFFERENCE", -1.0)
    stream = LayerStream(tiny_family("gemma2"))
    assert not stream.exact
    for row, logits in zip(ROWS, stream.logits(ROWS), strict=True):
        assert (logits - whole(tiny_family("gemma2"), row)).abs().max() < 1e-5
    with pytest.raises(RecipeError, match="Gemma2ForCausalLM cannot run a layer at a time.*rounding: rtn"):
        stream.embed(ROWS)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_tiny_family(tmp_path / "base", "qwen3", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        LayerStream(folder)
