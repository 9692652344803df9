"""Recipe method `fier`: a variant with retrieval in its engine half, and what cannot work refused by name."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from metier.agents import Ask, Message, ScriptedBackend, TrafficRow, write_traffic
from metier.agents.errors import QualityError, RecipeError
from metier.specializers import EngineSpec, Recipe, Shelf, produce
from metier.specializers.methods.fier.key_retrieval import attend
from metier.specializers.methods.fier.retrieval_recall import capture_attention, choices, measure_recall
from metier.specializers.methods.fier.sweep import BudgetPoint, smallest_budget
from metier.specializers.shelf.fier_settings import FierSettings
from tests.tiny_families import write_tiny_family
from tests.tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("fier") / "base", head_dim=64, layers=4)


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate({"name": "long", "methods": [{"method": "fier", **fields}]})


def test_the_engine_half_retrieves_and_the_weights_are_the_bases(base: Path, tmp_path: Path) -> None:
    variant = produce(recipe(budget_tokens=256), shelf=Shelf(tmp_path), base=base)
    assert variant.engine.attention == "fier" and variant.engine.weights == "base"
    assert variant.engine.fier is not None and variant.engine.fier.budget_tokens == 256
    assert variant.card["fier"]["memory_beside_kv_cache"] == pytest.approx((0.5 + 1 / 64 + 1 / 32) / 2, abs=1e-4)
    assert Shelf(tmp_path).get("long") == variant
    assert variant.checkpoint == "base" and variant.served_by == "base+fier-256-32-2-2048-4"  # an engine of its own


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"budget_tokens": 2048}, "context of 2048"),
        ({"budget_tokens": 0}, "budget_tokens"),
        ({"budget_tokens": -1}, "budget_tokens"),
        ({"group_tokens": 33}, "group_tokens"),
        ({"dense_layers": 4}, "dense_layers 4"),
    ],
)
def test_what_cannot_work_is_refused(base: Path, tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        produce(recipe(**fields), shelf=Shelf(tmp_path), base=base)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"head_dim": 48}, "heads of 48 channels"),
        ("mistral", {}, "a sliding window in every layer"),
        ("ministral", {"layer_types": ["sliding_attention"] * 4}, "no layer of full attention"),
        ("gemma2", {}, "capped attention logits"),
        ("llama", {"num_attention_heads": 34, "num_key_value_heads": 1, "hidden_size": 68}, "34 query heads on one"),
    ],
)
def test_models_whose_layers_would_all_keep_stock_attention_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    base = write_tiny_family(tmp_path / "base", family, **changes)
    with pytest.raises(RecipeError, match=said):
        produce(recipe(), shelf=Shelf(tmp_path / "shelf"), base=base)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen2", "qwen3"])
def test_models_with_some_layers_of_full_attention_pass(tmp_path: Path, family: str) -> None:
    base = write_tiny_family(tmp_path / "base", family)
    assert produce(recipe(), shelf=Shelf(tmp_path / "shelf"), base=base).card["fier"]


def test_stock_variants_keep_their_record_and_half_a_choice_is_refused() -> None:
    assert "fier" not in EngineSpec(base="b").model_dump()
    with pytest.raises(ValidationError, match="goes with attention"):
        EngineSpec(base="b", attention="fier")


# ---- the budget is picked on a role's own asks --------------------------------------------------------------------

PROGRAM = """
from pydantic import BaseModel
from metier.agents import Role

class Number(BaseModel):
    value: int

reader = Role("reader", takes={"text": str}, gives=Number, max_tokens=9)
"""
CHOOSE = {"role": "roles.py:reader", "budgets": [32, 64, 128], "margin": 0.2, "recall_rows": 1}
ASKS = 10


class Engines:
    """A backend that gets `right` asks right at each budget, 0 being full attention."""

    def __init__(self, right: dict[int, int]) -> None:
        self.right = right
        self.asked: list[int] = []
        self.fails_at: int | None = None

    @asynccontextmanager
    async def __call__(self, shelf: Shelf) -> AsyncGenerator[ScriptedBackend]:
        seen: dict[int, int] = {}

        def answer(ask: Ask) -> str:
            fier = None if ask.variant is None else shelf.get(ask.variant).engine.fier
            budget = 0 if fier is None else fier.budget_tokens
            if budget == self.fails_at:
                raise RuntimeError("the machine went down")
            self.asked.append(budget)
            seen[budget] = seen.get(budget, 0) + 1
            return f'{{"value":{4 if seen[budget] <= self.right[budget] else 5}}}'

        yield ScriptedBackend({"reader": answer})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "roles.py").write_text(PROGRAM)
    asked = (Message(role="user", content="two and two are four, " * 60),)
    row = TrafficRow(role="reader", messages=asked, reply='{"value":4}', score=1.0)
    write_traffic(tmp_path / "rows.jsonl", [row] * ASKS)
    return tmp_path


def choosing(folder: Path, name: str = "long", parent: str = "base", **fields: Any) -> Recipe:
    method = {"method": "fier", "min_context_tokens": 96, "dense_layers": 1, "choose": CHOOSE, **fields}
    given = {"name": name, "parent": parent, "data": {"traffic": "rows.jsonl"}, "methods": [method], "folder": folder}
    return Recipe.model_validate(given)


def test_the_smallest_budget_that_holds_the_role_is_picked_and_the_card_has_the_curve(base: Path, folder: Path) -> None:
    engines = Engines({0: 9, 32: 4, 64: 7, 128: 9})
    shelf = Shelf(folder / "shelf")
    variant = produce(choosing(folder), shelf=shelf, base=base, open_backend=engines)
    assert variant.engine.fier is not None and variant.engine.fier.budget_tokens == 64
    assert variant.engine.fier.min_context_tokens == 96
    assert sorted(engines.asked) == sorted([0, 32, 64, 128] * ASKS)
    assert [v.name for v in shelf.list()] == ["long"]  # what was tried is not kept
    card = variant.card
    assert (card["role"], card["asks"], card["fier_budget"]) == ("reader", ASKS, 64)
    points = {point["budget_tokens"]: point for point in card["fier"]["points"]}
    assert {budget: point["quality"] for budget, point in points.items()} == {0: 0.9, 32: 0.4, 64: 0.7, 128: 0.9}
    assert points[64]["change"][0] == pytest.approx(-0.2) and points[0]["change"] == [0, 0, 0]
    recall = {(point["way"], point["budget_tokens"]): point for point in card["fier"]["recall"]}
    assert {way for way, _ in recall} == {"exact", "fier", "quest", "window"}
    for budget in CHOOSE["budgets"]:
        best = recall["exact", budget]
        assert best["recall"] == 1.0
        assert all(recall[way, budget]["recall"] <= 1.0 for way in ("fier", "quest", "window"))
    assert produce(choosing(folder), shelf=shelf, base=base, open_backend=engines) == variant


def test_no_budget_that_holds_is_an_error_and_a_killed_sweep_goes_on(base: Path, folder: Path) -> None:
    engines = Engines({0: 9, 32: 1, 64: 2, 128: 3})
    engines.fails_at = 128
    shelf = Shelf(folder / "shelf")
    with pytest.raises(RuntimeError, match="went down"):
        produce(choosing(folder), shelf=shelf, base=base, open_backend=engines)
    engines.fails_at = None
    with pytest.raises(QualityError, match="0.900 with full attention, and at best 0.300 when it retrieves 128"):
        produce(choosing(folder), shelf=shelf, base=base, open_backend=engines)
    assert sorted(engines.asked) == sorted([0, 32, 64, 128] * ASKS)
    assert shelf.list() == []


def test_an_adapter_goes_along(base: Path, folder: Path) -> None:
    shelf = Shelf(folder / "shelf")
    lora = {"method": "lora", "rank": 2, "alpha": 4, "steps": 1, "batch_rows": 2, "warmup_steps": 0}
    recipe = {"name": "tuned", "data": {"traffic": "rows.jsonl"}, "methods": [{**lora, "max_row_tokens": 1024}]}
    tuned = produce(Recipe.model_validate({**recipe, "folder": folder}), shelf=shelf, base=base)
    engines = Engines({0: 9, 32: 9, 64: 9, 128: 9})
    variant = produce(choosing(folder, parent="tuned"), shelf=shelf, base=base, open_backend=engines)
    assert variant.ask == tuned.ask and variant.parent == tuned.id
    assert variant.engine.fier is not None and variant.engine.fier.budget_tokens == 32
    adapters = [{k: v for k, v in one.files.items() if k.startswith("adapter/")} for one in (tuned, variant)]
    assert adapters[0] == adapters[1] != {}


@pytest.mark.parametrize(
    ("fields", "served", "said"),
    [
        ({"min_context_tokens": 1000}, True, "0 of the 10 asks have 1000 tokens"),
        ({}, False, "nothing is served"),
        ({"choose": {**CHOOSE, "budgets": [64, 4096]}}, True, "budget_tokens 4096"),
    ],
)
def test_sweeps_that_cannot_say_anything_are_refused(
    base: Path, folder: Path, fields: dict[str, Any], served: bool, said: str
) -> None:
    engines = Engines({0: 9, 32: 9, 64: 9, 128: 9}) if served else None
    with pytest.raises(RecipeError, match=said):
        produce(choosing(folder, **fields), shelf=Shelf(folder / "shelf"), base=base, open_backend=engines)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"budget_tokens": 64}, "one of the two"),
        ({"choose": {**CHOOSE, "budgets": [64, 32]}}, "rising"),
        ({"choose": {**CHOOSE, "budgets": [2, 32]}}, "sink_tokens 4"),
    ],
)
def test_contradicting_settings_are_refused(folder: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        choosing(folder, **fields)


def test_where_no_budget_holds_none_is_picked() -> None:
    points = [
        BudgetPoint(budget, 0.5, (change, 0.0, 0.0), 1.0, 1.0) for budget, change in ((0, 0), (8, -0.1), (16, -0.05))
    ]
    assert smallest_budget(points, 0.05) == points[2]
    assert smallest_budget(points, 0.1) == points[1]
    assert smallest_budget(points, 0.01) is None


def test_captured_queries_and_keys_are_those_the_model_attends_with(base: Path) -> None:
    """From them its last layer's output, and so the model's own logits, follow."""
    from transformers import AutoModelForCausalLM

    ids = [3 + i * i % 300 for i in range(70)]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    seen: list[torch.Tensor] = []
    last = model.model.layers[-1].self_attn
    last.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, -1]))
    values: list[torch.Tensor] = []
    last.v_proj.register_forward_hook(lambda module, inputs, output: values.append(output[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    query, keys = capture_attention(base, [ids])[0][-1]
    value = values[0].unflatten(-1, (keys.shape[0], -1)).transpose(0, 1)
    shared = query.unflatten(0, (keys.shape[0], -1))
    found = [attend(shared[h], keys[h], value[h], last.scaling) for h in range(len(keys))]
    torch.testing.assert_close(torch.cat(found).flatten(), seen[0], rtol=1e-4, atol=1e-5)


def test_ways_have_the_tokens_they_are_worth(base: Path) -> None:
    keys = torch.randn(2, 320, 64, generator=torch.Generator().manual_seed(1))
    query = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    chosen = choices(query, keys, FierSettings(sink_tokens=4), 48)
    assert {way: {len(at) for at in found} for way, found in chosen.items()} == {
        "exact": {48}, "fier": {48}, "quest": {48}, "window": {68},
    }  # fmt: skip
    points = measure_recall(base, [[3 + i * i % 300 for i in range(70)]], FierSettings(dense_layers=1), [16, 64])
    assert {point.budget_tokens for point in points} == {16}  # its whole groups hold no more than 64
    assert json.dumps([point.mass for point in points])
