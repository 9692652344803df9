"""PAT as a recipe step: from rows to a narrower checkpoint, killed runs, bad input, and whether choosing pays."""

from __future__ import annotations

import json
import math
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metier.agents import RecipeError, TrafficRow, TrainingError, VariantError, write_traffic
from metier.specializers import Recipe, Shelf, produce
from metier.specializers.checkpoints.prunable_models import read_prunable
from metier.specializers.training.loop import Progress
from tests.tiny_model import write_random_lora, write_tiny_llama

METHOD: dict[str, Any] = {
    "method": "pat",
    "hidden_size": 48,
    "lora_rank": 4,
    "operator_rank": 4,
    "steps": 9,
    "batch_rows": 4,
    "warmup_steps": 1,
    "checkpoint_steps": 2,
    "milestone_share": 0.5,
    "learning_rate": 0.01,
    "dtype": "float32",
}


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[TrafficRow]) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    write_traffic(place / "rows.jsonl", rows)
    return place


def recipe(folder: Path, *, parent: str = "base", **changes: Any) -> Recipe:
    fields = {
        "name": "narrow",
        "parent": parent,
        "data": {"traffic": "rows.jsonl"},
        "methods": [{**METHOD, **changes}],
        "folder": folder,
    }
    return Recipe.model_validate(fields)


def make(folder: Path, base: Path, shelf: Path, *, on_progress: Any = None, **changes: Any) -> tuple[Any, Path]:
    shelf_of = Shelf(shelf)
    variant = produce(recipe(folder, **changes), shelf=shelf_of, base=base, on_progress=on_progress)
    return variant, shelf_of.path(variant) / "weights"


def logits(weights: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 41, 7, 19, 2]])).logits


def test_a_recipe_becomes_a_narrower_checkpoint(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    variant, weights = make(folder, tiny_base, tmp_path / "shelf")
    base, pruned = read_prunable(tiny_base), read_prunable(weights)
    assert pruned.hidden_size == 48 and pruned.head_dim == base.head_dim and pruned.tied
    assert variant.engine.weights == "own" and variant.ask.adapter is None
    card = variant.card
    assert card["parameters"] == pruned.parameters and card["parameters_of_base"] == pytest.approx(0.75)
    assert card["non_embedding_of_base"] == pytest.approx(0.75)
    assert card["merge_error"] < 1e-4 and card["mask"]["kept"] == 48 and not card["int4_kernels"]
    assert 0 <= card["mask"]["hardening_jump"] <= 1 and card["steps"] == 9
    text = (weights / "config.json").read_text()
    assert str(tmp_path) not in text and str(tiny_base) not in text
    assert json.loads(text)["model_type"] == "llama"
    assert logits(weights).isfinite().all()
    log = [json.loads(line) for line in (weights.parent / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 10))
    assert all(entry["active_loss"] > 0 for entry in log[:4])
    assert all(entry["active_loss"] == 0 for entry in log[4:])  # hard from the milestone on
    assert all(entry["identity_loss"] > 0 for entry in log)


@pytest.mark.parametrize("changes", [{}, {"channels": "random"}, {"harden": "end", "mask_start": "zeros"}], ids=str)
def test_a_killed_run_ends_with_the_same_weights(
    tmp_path: Path, folder: Path, tiny_base: Path, changes: dict[str, Any]
) -> None:
    _, whole = make(folder, tiny_base, tmp_path / "whole", **changes)

    def kill_at(step: int) -> Callable[[Progress], None]:
        def stop(progress: Progress) -> None:
            if progress.step == step:
                raise KilledError

        return stop

    for step in (3, 7):  # before and after the mask is hard
        with pytest.raises(KilledError):
            make(folder, tiny_base, tmp_path / "cut", on_progress=kill_at(step), **changes)
    _, cut = make(folder, tiny_base, tmp_path / "cut", **changes)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_widths_that_are_no_multiple_of_the_heads_and_untied_heads(tmp_path: Path, folder: Path) -> None:
    # A small vocabulary beside the blocks, so that a head of its own does not eat what pruning saves.
    base = write_tiny_llama(tmp_path / "base", hidden=96, heads=6, kv_heads=3, intermediate=512)
    variant, weights = make(folder, base, tmp_path / "shelf", hidden_size=64, embedding_operator="trained", steps=4)
    config = json.loads((weights / "config.json").read_text())
    assert config["model_type"] == "mistral" and config["head_dim"] == 32 and not config["tie_word_embeddings"]
    assert not variant.card["tied_head"] and variant.card["int4_kernels"]
    assert variant.card["architecture"] == "MistralForCausalLM"
    assert logits(weights).isfinite().all()


def test_a_base_in_bfloat16_is_tuned_and_checked_in_float32_and_written_as_it_was(tmp_path: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base = write_tiny_llama(tmp_path / "base", hidden=96, heads=6, kv_heads=3, dtype="bfloat16")
    variant, weights = make(folder, base, tmp_path / "shelf", hidden_size=64, steps=4)
    assert variant.card["merge_error"] < 1e-4
    assert json.loads((weights / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(weights / "model.safetensors").values()} == {torch.bfloat16}


def test_a_lora_parent_is_folded_in_first(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    from metier.specializers.methods.method import Job
    from metier.specializers.methods.pat.pat import PatSettings, make_pat
    from metier.specializers.shelf.variant import AskSpec

    adapter = write_random_lora(tmp_path / "adapter", tiny_base, rank=4)
    made: dict[str, Any] = {}
    for name, given, ask in (
        ("without", None, AskSpec()),
        ("with", adapter, AskSpec(adapter="lora", rank=4)),
    ):
        (tmp_path / name).mkdir()
        from metier.specializers.recipes.recipe import read_rows

        job = Job(
            model=tiny_base,
            base_name="tiny",
            adapter=given,
            ask=ask,
            rows=read_rows(recipe(folder)),
            seed=0,
            out=tmp_path / name,
            work_dir=tmp_path / name / "work",
            fingerprint=name,
        )
        assert make_pat(PatSettings.model_validate({**METHOD, "steps": 4}), job).ask.adapter is None
        made[name] = logits(tmp_path / name / "weights")
    assert (made["with"] - made["without"]).abs().max() > 0.1
    with pytest.raises(RecipeError, match=r"adapter of kind 'trex'.*Set parent: base"):
        from dataclasses import replace

        make_pat(PatSettings.model_validate(METHOD), replace(job, ask=AskSpec(adapter="trex", rank=4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 50}, r"hidden_size 50 is no multiple of 16.*such as 48.*"),
        ({"hidden_size": 64}, r"hidden_size 64 is no smaller than the model's 64"),
    ],
)
def test_what_cannot_work_is_said_before_training(
    tmp_path: Path, folder: Path, tiny_base: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make(folder, tiny_base, tmp_path / "shelf", **changes)
    assert not (tmp_path / "shelf").exists()


def test_a_head_of_its_own_that_makes_the_model_larger_is_refused(tmp_path: Path, folder: Path) -> None:
    mostly_embedding = write_tiny_llama(tmp_path / "base", intermediate=16)
    with pytest.raises(RecipeError, match=r"hidden_size 48.*head of its own.*fewer than.*mask_only"):
        make(folder, mostly_embedding, tmp_path / "shelf", embedding_operator="trained")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 8}, r"methods\[0\].hidden_size: 8"),
        ({"milestone_share": 0.1}, r"steps x milestone_share must be at least 2"),
        ({"weight_decay": 0.1}, r"weight_decay must be 0"),
        ({"embedding_operator": "mask"}, r"embedding_operator: 'mask'"),
        ({"hidden": 48}, r"unknown field.*Did you mean 'hidden_size'"),
    ],
)
def test_settings_are_checked_when_a_recipe_is_read(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(folder, **changes)


def test_models_that_cannot_be_pruned_are_named(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    import shutil

    def changed(name: str, **config: Any) -> Path:
        place = tmp_path / name
        shutil.copytree(tiny_base, place)
        path = place / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return place

    with pytest.raises(RecipeError, match=r"type 'gpt2'.*gemma, gemma2, .*llama, .*qwen3.*model.embed_tokens"):
        make(folder, changed("gpt2", model_type="gpt2"), tmp_path / "shelf")
    with pytest.raises(RecipeError, match=r"is quantised.*Prune first and quantise after"):
        make(folder, changed("int8", quantization_config={"quant_method": "compressed-tensors"}), tmp_path / "shelf")
    biased = changed("biased", attention_bias=True, num_attention_heads=6)
    with pytest.raises(RecipeError, match=r"32 is no multiple of the model's 6 heads.*no biases"):
        make(folder, biased, tmp_path / "shelf", hidden_size=32)


def test_a_run_that_diverges_keeps_its_last_good_state(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d of 9: loss.*Lower learning_rate"):
        make(folder, tiny_base, tmp_path / "shelf", learning_rate=1e30, checkpoint_steps=1)
    checkpoints = list((tmp_path / "shelf").rglob("checkpoint.safetensors"))
    assert len(checkpoints) == 1
    assert not Shelf(tmp_path / "shelf").list()


def test_a_full_disk_leaves_nothing_half_on_the_shelf(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    import torch

    from metier.specializers.checkpoints.dense_checkpoint import write_dense

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError, match=r"I/O error"):
            write_dense(tmp_path / "weights", {"a": torch.zeros(1 << 18)}, {"dtype": "float32"})
        with pytest.raises((VariantError, TrainingError), match=r"cannot be written"):
            make(folder, tiny_base, tmp_path / "shelf", checkpoint_steps=100, steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not Shelf(tmp_path / "shelf").list()
    _, weights = make(folder, tiny_base, tmp_path / "shelf", checkpoint_steps=100, steps=4)
    assert logits(weights).isfinite().all()


def test_values_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    import torch

    from metier.specializers.checkpoints.dense_checkpoint import write_dense

    with pytest.raises(TrainingError, match=r"b of the new checkpoint holds values that are not finite"):
        write_dense(tmp_path, {"a": torch.zeros(2), "b": torch.tensor([1.0, math.inf])}, {})
    assert not (tmp_path / "model.safetensors").exists()


def test_learned_channels_beat_random_ones(tmp_path: Path, folder: Path) -> None:
    """Half of the channels goes. The base is tuned on the rows first, then every second channel is made to matter less.

    Its loss is stationary, so the gradient alone says little: what the published start finds is close to chance.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from metier.specializers.recipes.recipe import read_rows
    from metier.specializers.training.batches import encode_rows
    from metier.specializers.training.loop import TrainingSettings, train

    base = write_tiny_llama(tmp_path / "base", weight_std=0.05)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    encoded = encode_rows(read_rows(recipe(folder)), tokenizer, max_row_tokens=200)
    settings = TrainingSettings(steps=60, batch_rows=12, learning_rate=5e-3, warmup_steps=5, dtype="float32")
    train(model, encoded, settings, seed=0, pad_token=0, checkpoint=tmp_path / "c", job="base")
    with torch.no_grad():
        scale = torch.ones(64)
        scale[1::2] = 0.02
        model.model.embed_tokens.weight *= scale
        for block in model.model.layers:
            block.self_attn.o_proj.weight *= scale[:, None]
            block.mlp.down_proj.weight *= scale[:, None]
    model.save_pretrained(base)
    losses = {}
    for channels in ("learned", "random"):
        settings_of = {"hidden_size": 32, "steps": 60, "batch_rows": 12, "learning_rate": 2e-3}
        variant, weights = make(folder, base, tmp_path / channels, channels=channels, **settings_of)
        losses[channels] = variant.card["final_loss"]
        if channels == "learned":
            # Channels of the merged model are the base's, in order: small ones would have small embeddings.
            merged = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
            sizes = merged.model.embed_tokens.weight.norm(dim=0)
            assert int((sizes > 0.1 * sizes.max()).sum()) == 32
            assert variant.card["mask"]["above_zero"] == 32
            assert variant.card["mask"]["hardening_jump"] < 0.05
    assert losses["learned"] < 0.7 * losses["random"]


def test_a_channels_importance_is_the_mean_square_of_its_gradient(folder: Path, tiny_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from metier.specializers.methods.pat.modules import ChannelMask
    from metier.specializers.methods.pat.tuner import PatModel, PatObjective, channel_importance
    from metier.specializers.recipes.recipe import read_rows
    from metier.specializers.training.batches import encode_rows

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    rows = encode_rows(read_rows(recipe(folder)), AutoTokenizer.from_pretrained(tiny_base), max_row_tokens=200)[:3]
    mask = ChannelMask(64, 48, milestone=10, harden_step=10)
    pat = PatModel(model, mask, rank=2, embedding_rank=2).double()
    objective = PatObjective(pat, pad_token=0, device="cpu", autocast=False)
    found = channel_importance(objective, rows)
    assert all(parameter.grad is None for parameter in pat.parameters())
    for channel in (0, 17, 63):
        squares = []
        for row in rows:  # the oracle: move that channel's proxy a little, everywhere at once
            values = []
            for change in (1e-3, -1e-3):
                with torch.no_grad():
                    mask.proxies[channel] = change
                    values.append(float(objective.loss([row])))
                    mask.proxies[channel] = 0.0
            squares.append(((values[0] - values[1]) / 2e-3) ** 2)
        # The loss is taken in float32, so small differences of it are rough.
        assert float(found[channel]) == pytest.approx(sum(squares) / 3, rel=0.05)
