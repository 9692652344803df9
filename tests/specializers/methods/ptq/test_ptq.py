"""Post-training quantisation from recipe to checkpoint: the weights, the card, the adapter, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from metier.agents import RecipeError, TrafficRow, write_traffic
from metier.specializers import AskSpec, Recipe, Shelf, Variant, load_recipe, produce
from metier.specializers.adapters.adapter_check import check_adapter
from metier.specializers.checkpoints.checkpoint_files import CheckpointReader
from metier.specializers.checkpoints.dense_model import load_dense_model
from metier.specializers.checkpoints.perplexity import measure_perplexity, offline_text, text_windows
from metier.specializers.checkpoints.quantisers import dequantise, gptq, round_activations, round_to_nearest
from metier.specializers.checkpoints.stored_weights import dense_names, quantised_layers, read_dense
from metier.specializers.training.batches import encode_rows
from tests.tiny_model import write_tiny_llama

W8A8 = {"method": "ptq", "perplexity_windows": 0}
W4A16 = {**W8A8, "scheme": "w4a16", "group_size": 32}
GPTQ = {**W4A16, "rounding": "gptq", "calibration_rows": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[TrafficRow]) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    write_traffic(place / "rows.jsonl", rows)
    return place


def recipe(folder: Path, *methods: dict[str, Any], **fields: Any) -> Recipe:
    given = {"name": "small", "data": {"traffic": "rows.jsonl"}, "methods": methods, "folder": folder}
    return Recipe.model_validate({**given, **fields})


def make(root: Path, folder: Path, base: Path, *methods: dict[str, Any], **fields: Any) -> tuple[Variant, Path]:
    shelf = Shelf(root / "shelf")
    variant = produce(recipe(folder, *methods, **fields), shelf=shelf, base=base)
    return variant, shelf.path(variant)


def read_all(weights: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(weights)
    return {name: read_dense(reader, name, torch.float32) for name in dense_names(reader)}


def test_a_w8a8_recipe_needs_no_data(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    variant, place = make(tmp_path, folder, tiny_base, {**W8A8, "perplexity_windows": 2}, data=None)
    assert (variant.engine.weights, variant.ask, variant.data) == ("own", AskSpec(), "")
    before, after = read_all(tiny_base), read_all(place / "weights")
    assert before.keys() == after.keys()
    layers = quantised_layers(CheckpointReader(place / "weights"))
    assert len(layers) == variant.card["quantised_layers"] == 14
    changes = weights = 0.0
    for name, weight in before.items():
        if name.removesuffix(".weight") in layers:
            values, scale = round_to_nearest(weight, bits=8, clip_search=True, scale_dtype=torch.float32)
            assert torch.equal(after[name], dequantise(values, scale))
            changes += float((after[name] - weight).square().sum())
            weights += float(weight.square().sum())
        else:
            assert torch.equal(after[name], weight)
    assert variant.card["weight_error"] == pytest.approx((changes / weights) ** 0.5, rel=1e-3)
    assert variant.card["weight_error"] < variant.card["worst_layer"]["weight_error"] < 0.02
    size = (place / "weights" / "model.safetensors").stat().st_size
    assert (variant.card["scheme"], variant.card["served_average_bits"]) == ("w8a8", 8.0)
    assert variant.card["bytes"] == size and variant.card["size_ratio"] < 0.7
    assert variant.card["perplexity"] == pytest.approx(variant.card["perplexity_before"], rel=0.05)
    assert variant.card["perplexity_on"]["text"] == offline_text()[0]


def test_w4a16_rounds_in_groups_with_layers_left_out(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    method = {**W4A16, "ignore": ["*.layers.0.*"], "overrides": {"*.layers.1.mlp.*": "w8a8"}}
    variant, place = make(tmp_path, folder, tiny_base, method, data=None)
    # Attention 64 x (128 + 2 x 64 + 128), MLP 64 x 128 x 3, in each of two layers; the first stays in 32 bits.
    attention, mlp = 64 * 384, 64 * 384
    expected_bits = (32 * (attention + mlp) + 4 * attention + 8 * mlp) / (2 * (attention + mlp))
    assert (variant.card["scheme"], variant.card["served_average_bits"]) == ("mixed", expected_bits)
    reader = CheckpointReader(place / "weights")
    assert all(name.startswith("model.layers.1.") for name in quantised_layers(reader))
    kinds = {name.rpartition(".")[2] for name in reader.tensors if ".layers.1.self_attn." in name}
    assert kinds == {"weight_packed", "weight_scale", "weight_shape"}
    assert reader.tensors["model.layers.1.mlp.up_proj.weight"].dtype == "I8"
    before, after = read_all(tiny_base), read_all(place / "weights")
    name = "model.layers.1.self_attn.o_proj.weight"
    expected = round_to_nearest(before[name], bits=4, group_size=32, clip_search=True, scale_dtype=torch.float32)
    assert torch.equal(after[name], dequantise(*expected))


def whole_model_gptq(base: Path, rows: list[TrafficRow], count: int, seed: int) -> dict[str, torch.Tensor]:
    """GPTQ without streaming: the whole model in memory, all of it run again for each layer."""
    import random

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), count))
    encoded = encode_rows([rows[i] for i in chosen], AutoTokenizer.from_pretrained(base), max_row_tokens=1024)
    rounded = {}
    for number, layer in enumerate(model.model.layers):
        linear = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        inputs: dict[str, list[torch.Tensor]] = {name: [] for name in linear}
        hooks = [
            module.register_forward_hook(lambda _m, args, _out, seen=inputs[name]: seen.append(args[0][0]))
            for name, module in linear.items()
        ]
        for row in encoded:
            model(input_ids=torch.tensor([row.tokens]))
        for hook in hooks:
            hook.remove()
        for name, module in linear.items():
            seen = torch.cat(inputs[name]).double()
            options: dict[str, Any] = {"bits": 4, "group_size": 32, "clip_search": True}
            values, scale = gptq(module.weight, (seen.T @ seen).float(), scale_dtype=torch.float32, **options)
            rounded[f"model.layers.{number}.{name}.weight"] = dequantise(values, scale)
            module.weight.copy_(rounded[f"model.layers.{number}.{name}.weight"])
    return rounded


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite"])
def test_streamed_gptq_is_gptq_of_the_whole_model(
    tmp_path: Path, folder: Path, tiny_family: Callable[[str], Path], rows: list[TrafficRow], family: str
) -> None:
    base = tiny_family(family)
    variant, place = make(tmp_path, folder, base, GPTQ, seed=3)
    after = read_all(place / "weights")
    for name, weight in whole_model_gptq(base, rows, 8, seed=3).items():
        # Sums in another order may tip a rounding, and one tipped value tips others of its row and of later layers.
        if ".layers.0." not in name and ".layers.1." not in name:
            continue
        assert ((after[name] - weight).abs() > 1e-5).float().mean() < 0.02, name
    again, _ = make(tmp_path / "again", folder, base, GPTQ, seed=3)
    assert again.id == variant.id


def test_gptq_changes_the_answers_less_than_rounding(
    tmp_path: Path, folder: Path, tiny_base: Path, rows: list[TrafficRow]
) -> None:
    encoded = encode_rows(rows, AutoTokenizer.from_pretrained(tiny_base), max_row_tokens=1024)

    def logits(weights: Path) -> torch.Tensor:
        model = load_dense_model(weights, torch.float32)
        with torch.no_grad():
            return torch.cat([model(input_ids=torch.tensor([row.tokens])).logits[0] for row in encoded])

    base = logits(tiny_base).log_softmax(-1)
    gaps = {}
    for name, method in {"rtn": W4A16, "gptq": {**GPTQ, "calibration_rows": 36}}.items():
        _, place = make(tmp_path / name, folder, tiny_base, method)
        gaps[name] = float((base.exp() * (base - logits(place / "weights").log_softmax(-1))).sum(-1).mean())
    assert gaps["gptq"] < 0.8 * gaps["rtn"]


def test_perplexity_is_that_of_the_whole_model(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    windows = text_windows(tokenizer, offline_text()[1], count=3, tokens=40)
    assert [len(window) for window in windows] == [40, 40, 40] and windows[0] != windows[2]

    def of_model(model: Any) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(windows)).logits[:, :-1]
        labels = torch.tensor(windows)[:, 1:]
        return math.exp(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())))

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert measure_perplexity(tiny_base, windows) == pytest.approx(of_model(base), rel=1e-4)
    _, int4 = make(tmp_path, folder, tiny_base, W4A16)
    assert measure_perplexity(int4 / "weights", windows) == pytest.approx(
        of_model(load_dense_model(int4 / "weights", torch.float32)), rel=1e-4
    )
    _, int8 = make(tmp_path, folder, tiny_base, W8A8)
    model = load_dense_model(int8 / "weights", torch.float32)
    weights_only = of_model(model)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _m, args: (round_activations(args[0]),))
    served = measure_perplexity(int8 / "weights", windows)
    assert served == pytest.approx(of_model(model), rel=1e-4)
    assert abs(served - weights_only) > 1e-4 * served


def test_the_parents_lora_is_merged_kept_or_dropped(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    from peft import PeftModel

    lora = {"method": "lora", "rank": 4, "steps": 3, "batch_rows": 4, "learning_rate": 0.05}
    parent, parent_place = make(tmp_path, folder, tiny_base, lora, name="tuned")
    tuned = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(tuned, parent_place / "adapter").merge_and_unload().state_dict()
    for choice in ("merge", "keep", "drop"):
        variant, place = make(tmp_path, folder, tiny_base, {**W4A16, "adapter": choice}, name=choice, parent="tuned")
        source = merged if choice == "merge" else read_all(tiny_base)
        for name, weight in read_all(place / "weights").items():
            if name.endswith("_proj.weight"):
                options: dict[str, Any] = {"bits": 4, "group_size": 32, "scale_dtype": torch.float32}
                expected = dequantise(*round_to_nearest(source[name], clip_search=True, **options))
                assert ((weight - expected).abs() > 1e-5).float().mean() < 0.005
        assert variant.ask == (parent.ask if choice == "keep" else AskSpec())
        assert (place / "adapter").is_dir() == (choice == "keep")
        assert variant.parent == parent.id
    left_out = {**W4A16, "ignore": ["*.down_proj"]}
    _, place = make(tmp_path, folder, tiny_base, left_out, name="left-out", parent="tuned")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.allclose(read_all(place / "weights")[name], merged[name], atol=1e-6)
    chained, _ = make(tmp_path, folder, tiny_base, lora, GPTQ, name="chained")
    assert chained.ask == AskSpec() and [s["method"] for s in chained.card["stages"]] == ["lora", "ptq"]


@pytest.mark.parametrize("method", [W8A8, W4A16], ids=["w8a8", "w4a16"])
def test_adapters_are_trained_on_quantised_weights(
    tmp_path: Path, folder: Path, tiny_base: Path, method: dict[str, Any]
) -> None:
    lora = {"method": "lora", "rank": 4, "steps": 3, "batch_rows": 4, "learning_rate": 0.02}
    parent, place = make(tmp_path, folder, tiny_base, method, data=None)
    child, child_place = make(tmp_path, folder, tiny_base, lora, name="tuned", parent="small")
    assert (child.checkpoint, child.ask.adapter) == (parent.id, "lora")
    facts = check_adapter(child_place / "adapter", place / "weights", slot_rank=8)
    assert len(facts.modules) == 14
    # The first loss is that of the rounded weights, which are not those of the base.
    _, plain_place = make(tmp_path, folder, tiny_base, lora, name="plain")
    on_rounded, on_base = (
        json.loads((p / "training_log.jsonl").read_text().splitlines()[0])["loss"] for p in (child_place, plain_place)
    )
    assert on_rounded != on_base and on_rounded == pytest.approx(on_base, rel=0.1)


def test_recipes_that_cannot_work_are_refused_when_loaded(tmp_path: Path) -> None:
    def load(text: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"name: small\nmethods:\n  - method: ptq\n{text}")
        return load_recipe(path)

    assert load("    scheme: w8a8\n").data is None
    for text, message in (
        ("    rounding: gptq\n", "data: missing, and method 'ptq' looks at rows"),
        ("    group_size: 48\n", r"methods\[0\]\.group_size: 48"),
        ("    scheme: w2a16\n", r"methods\[0\]\.scheme: 'w2a16'"),
        ("    overrides: {'*.q_proj': w4a16}\n", "q_proj has scheme w4a16-g64 and k_proj has w8a8"),
        ("    ignore: ['*.up_proj']\n", "gate_proj has scheme w8a8 and up_proj has none"),
        ("    ignore: ['lm_head']\n", "lm_head' matches no layer that can be quantised.*stays as it is"),
    ):
        with pytest.raises(RecipeError, match=message):
            load(text)


def test_what_does_not_fit_the_checkpoint_is_said_before_anything_is_made(
    tmp_path: Path, folder: Path, tiny_base: Path
) -> None:
    shelf = Shelf(tmp_path / "shelf")

    def refuse(message: str, *methods: dict[str, Any], base: Path = tiny_base, **fields: Any) -> None:
        before = [variant.id for variant in shelf.list()]
        with pytest.raises(RecipeError, match=message):
            produce(recipe(folder, *methods, **fields), shelf=shelf, base=base)
        assert [variant.id for variant in shelf.list()] == before

    refuse(r"group_size 128 does not divide the 64 inputs of model\.layers\.0", {**W4A16, "group_size": 128})
    refuse(r"pattern '\*\.layers\.7\.\*' matches no layer", {**W8A8, "ignore": ["*.layers.7.*"]})
    lora = {"method": "lora", "rank": 4, "steps": 1, "batch_rows": 4}
    refuse(r"group_size 128 does not divide", lora, {**W4A16, "group_size": 128})
    narrow = write_tiny_llama(tmp_path / "narrow", intermediate=112)
    refuse(r"gate_proj|down_proj", {**W4A16, "group_size": 32}, base=narrow)
    produce(recipe(folder, W8A8), shelf=shelf, base=tiny_base)
    refuse("are quantised already", W4A16, parent="small", name="twice")


@pytest.mark.parametrize("method", [W8A8, GPTQ], ids=["rtn", "gptq"])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, folder: Path, tiny_base: Path, method: dict[str, Any]
) -> None:
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.up_proj has weights that are not finite"):
        make(tmp_path, folder, broken, method)


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    produce(recipe(folder, W8A8), shelf=shelf, base=tiny_base)
    twin = write_tiny_llama(tmp_path / "twin", seed=1)
    lora = {"method": "lora", "rank": 4, "steps": 1, "batch_rows": 4}
    with pytest.raises(RecipeError, match="descends from base"):
        produce(recipe(folder, lora, name="child", parent="small"), shelf=shelf, base=twin)


FULL_DISK = """
import resource, sys
from pathlib import Path
from metier.specializers import Recipe, Shelf, produce

recipe = Recipe.model_validate_json(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
produce(recipe, shelf=Shelf(Path(sys.argv[2])), base=Path(sys.argv[3]))
"""


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    wanted = recipe(folder, W8A8, data=None)
    script = [sys.executable, "-c", FULL_DISK, wanted.model_dump_json(), str(tmp_path / "shelf"), str(tiny_base)]
    failed = subprocess.run(script, capture_output=True, text=True, check=False, env={**os.environ})
    assert "VariantError: variant 'small' cannot be written: [Errno 27]" in failed.stderr, failed.stderr
    assert Shelf(tmp_path / "shelf").list() == []
    assert not list((tmp_path / "shelf").rglob("*.safetensors*"))
    assert json.loads((tiny_base / "config.json").read_text()).get("quantization_config") is None
