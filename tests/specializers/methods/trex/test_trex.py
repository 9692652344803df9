"""The method `trex`: from a recipe to an adapter folder, and what its training does with c, omega and gamma."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from metier.agents import Message, RecipeError, TrafficRow, TrainingError, write_traffic
from metier.specializers import AskSpec, Recipe, Shelf, load_recipe, produce
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.adapters.trex_shape import SHARPNESS
from metier.specializers.methods.trex.tuner import TrexConfig
from metier.specializers.training.batches import EncodedRow, shared_start
from metier.specializers.training.loop import TrainingSettings, train
from metier.specializers.training.objective import answer_loss

R1, R2 = 2, 3


def row(task: str, reply: str) -> TrafficRow:
    messages = (Message(role="system", content="Do your own step."), Message(role="user", content=task))
    return TrafficRow(role="solver", messages=messages, reply=reply, score=1.0, task=task)


ROWS = [
    row(f"{a} {word} {b}", str(a + b if word == "plus" else a - b))
    for a in range(4)
    for b in range(4)
    for word in ("plus", "minus")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trex")
    write_traffic(place / "rows.jsonl", ROWS)
    return place


def recipe(folder: Path, **changes: Any) -> Recipe:
    small = {"r1": R1, "r2": R2, "steps": 4, "batch_rows": 4, "warmup_steps": 1, "learning_rate": 0.01}
    method = {"method": "trex", **small, **changes.pop("method", {})}
    fields = {"name": "mixed", "data": {"traffic": "rows.jsonl"}, "methods": [method], "folder": folder}
    return Recipe.model_validate({**fields, **changes})


def block(shelf: Shelf, name: str) -> dict[str, Any]:
    text = (shelf.path(name) / "adapter" / "adapter_config.json").read_text()
    return dict(json.loads(text)["trex"])


def test_a_recipe_that_no_slot_holds_is_refused_when_it_is_read(folder: Path) -> None:
    assert recipe(folder, method={"r1": 16, "r2": 31})
    with pytest.raises(RecipeError, match=r"r1 16 and r2 32 make .* = 528 rows .* at most 512.*set r2 to 31 or less"):
        recipe(folder, method={"r1": 16, "r2": 32})


def test_a_recipe_becomes_an_adapter_that_peft_loads(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    variant = produce(recipe(folder, method={"steps": 12}), shelf=shelf, base=tiny_base)
    assert variant.ask == AskSpec(adapter="trex", rank=R1 + R1 * R2)
    shelf.verify(variant)
    adapter = shelf.path(variant) / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    assert {kind for name, kind in kinds.items() if ".lora_" in name} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if "trex_" in name} == {torch.float32}
    assert str(tiny_base) not in (adapter / "adapter_config.json").read_text()
    card = variant.card
    assert card["parameters"] == sum(t.numel() for name, t in tensors.items() if "layers" in name)
    assert card["intuition"]["clusters"] == R1 * R2 and -1.0 <= card["intuition"]["min"] <= card["intuition"]["max"]
    for name, key in (("alpha", "trex_omega"), ("scale", "trex_gamma")):
        values = [float(torch.sigmoid(SHARPNESS * t)) for n, t in tensors.items() if n.endswith(key)]
        assert card[name] == pytest.approx(
            {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}, abs=1e-4
        )
        assert 0.3 < min(values) < max(values) < 0.7 and max(values) - min(values) > 0.001
    log = [json.loads(line)["loss"] for line in (shelf.path(variant) / "training_log.jsonl").read_text().splitlines()]
    assert len(log) == 12 and log[-1] < 0.9 * log[0]
    # What peft loads from there gives the loss that training ended with.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), adapter)
    tasks = [ROWS[0].task, ROWS[1].task]
    c = torch.tensor([SemanticMap.load(adapter).intuition(task) for task in tasks])
    assert model(input_ids=torch.arange(5, 25).view(2, 10), intuition=c).logits.isfinite().all()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise StoppedError

    wanted, shelf = recipe(folder, method={"checkpoint_steps": 2}), Shelf(tmp_path / "shelf")
    with pytest.raises(StoppedError):
        produce(wanted, shelf=shelf, base=tiny_base, on_progress=stop)
    seen: list[int] = []
    variant = produce(wanted, shelf=shelf, base=tiny_base, on_progress=lambda progress: seen.append(progress.step))
    assert seen == [3, 4]
    assert variant.id == produce(wanted, shelf=Shelf(tmp_path / "whole"), base=tiny_base).id


def test_without_intuition_it_is_left_out_of_serving_too(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    produce(recipe(folder, method={"k_tok": 3.0, "k_task": 2.0}), shelf=shelf, base=tiny_base)
    produce(recipe(folder, name="ablated", method={"intuition": False}), shelf=shelf, base=tiny_base)
    assert (block(shelf, "mixed")["k_tok"], block(shelf, "mixed")["k_task"]) == (3.0, 2.0)
    assert (block(shelf, "ablated")["k_tok"], block(shelf, "ablated")["k_task"]) == (6.0, 0.0)


def test_training_goes_on_from_a_parent_of_the_same_sizes(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    parent = produce(recipe(folder, method={"steps": 12}), shelf=shelf, base=tiny_base)
    child = produce(recipe(folder, name="child", parent="mixed", seed=1), shelf=shelf, base=tiny_base)
    first = [json.loads((shelf.path(v) / "training_log.jsonl").read_text().splitlines()[0]) for v in (parent, child)]
    assert first[1]["loss"] < first[0]["loss"]
    maps = [SemanticMap.load(shelf.path(v) / "adapter") for v in (parent, child)]
    assert maps[0].intuition("4 plus 4") == maps[1].intuition("4 plus 4")  # the parent's, though the seed is another
    with pytest.raises(RecipeError, match=r"r2 4 differs from the parent adapter's 3.*r2: 3"):
        produce(recipe(folder, parent="mixed", method={"r2": 4}), shelf=shelf, base=tiny_base)
    lora = {"methods": [{"method": "lora", "steps": 1, "rank": 2}], "parent": "mixed", "name": "plain"}
    with pytest.raises(RecipeError, match=r"adapter is of kind TREX.*kind LORA"):
        produce(recipe(folder, **lora), shelf=shelf, base=tiny_base)
    produce(recipe(folder, **{**lora, "parent": "base"}), shelf=shelf, base=tiny_base)
    with pytest.raises(RecipeError, match=r"adapter is of kind LORA.*kind TREX"):
        produce(recipe(folder, parent="plain"), shelf=shelf, base=tiny_base)


def test_rows_and_settings_that_do_not_fit_are_named(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    write_traffic(tmp_path / "rows.jsonl", [*ROWS, row("5 plus 5", "10").model_copy(update={"task": ""})])
    with pytest.raises(RecipeError, match=r"row 33 has no task.*task_text"):
        produce(recipe(tmp_path), shelf=shelf, base=tiny_base)
    with pytest.raises(RecipeError, match=r"32 distinct tasks.*r1·r2 = 40"):
        produce(recipe(folder, method={"r1": 5, "r2": 8}), shelf=shelf, base=tiny_base)
    with pytest.raises(RecipeError, match=r"targets \['w_proj'\]"):
        produce(recipe(folder, method={"targets": ["w_proj"]}), shelf=shelf, base=tiny_base)
    with pytest.raises(TrainingError, match="max_row_tokens=10"):
        produce(recipe(folder, method={"max_row_tokens": 10}), shelf=shelf, base=tiny_base)
    text = "name: mixed\ndata: {traffic: rows.jsonl}\nmethods: [{method: trex, k_tsk: 4}]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"k_tsk: unknown field.*k_task"):
        load_recipe(tmp_path / "recipe.yaml")
    assert shelf.list() == []


# -- the loop -----------------------------------------------------------------------------------------------


def tuned(tiny_base: Path) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        TrexConfig(task_type="CAUSAL_LM", r1=R1, r2=R2, target_modules=["q_proj", "v_proj", "up_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at zero it would hide errors
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def encoded(*intuition: tuple[float, ...] | None) -> list[EncodedRow]:
    return [EncodedRow((5, 6, 7, 8 + n, *range(20, 23 + n)), 5, c) for n, c in enumerate(intuition)]


ONE, OTHER = (0.9, 0.1, -0.3, 0.0, 0.2, -0.5), (-0.4, 0.8, 0.0, 0.3, -0.1, 0.6)


@pytest.mark.parametrize(("intuition", "shared"), [((ONE, OTHER, ONE), 0), ((ONE, ONE, ONE), 3)])
def test_the_loss_gives_each_row_its_own_intuition(tiny_base: Path, intuition: Any, shared: int) -> None:
    model, batch = tuned(tiny_base), encoded(*intuition)
    assert shared_start(batch) == shared
    total, tokens = torch.zeros(()), 0
    for one in batch:  # the oracle: one row, no padding, nothing shared
        logits = model(input_ids=torch.tensor([one.tokens]), intuition=torch.tensor([one.intuition])).logits[0]
        for at in range(one.prompt_tokens, len(one.tokens)):
            total = total - torch.log_softmax(logits[at - 1], dim=-1)[one.tokens[at]]
            tokens += 1
    assert answer_loss(model, batch, pad_token=0).item() == pytest.approx((total / tokens).item(), rel=1e-5)


def test_parameters_of_one_factor_are_a_group_with_its_own_rate_and_clipping(tmp_path: Path, tiny_base: Path) -> None:
    def moved(factor: float, clip_norm: float = 1.0) -> dict[str, float]:
        model = tuned(tiny_base)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        train(
            model,
            encoded(ONE, OTHER),
            TrainingSettings(steps=1, warmup_steps=0, learning_rate=1e-2, clip_norm=clip_norm, dtype="float32"),
            seed=0,
            pad_token=0,
            checkpoint=tmp_path / f"{factor}-{clip_norm}.safetensors",
            job="job",
            rate_factor=lambda name: factor if ".trex_" in name else 1.0,
        )
        after = dict(model.named_parameters())
        steps: dict[str, float] = {"matrices": 0.0, "scalars": 0.0}
        for name, value in before.items():
            kind = "scalars" if ".trex_" in name else "matrices"
            steps[kind] = max(steps[kind], float((after[name].detach() - value).abs().max()))
        return steps

    # The first step of Adam is as long as the rate, whatever the gradient.
    assert moved(0.02)["scalars"] == pytest.approx(0.02 * 1e-2, rel=1e-3)
    assert moved(0.02)["matrices"] == moved(0.5)["matrices"] == pytest.approx(1e-2, rel=1e-3)
