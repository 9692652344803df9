"""MSQ as a method: bits fall until the target, what is exported is what was trained, and it resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.agents import RecipeError, TrafficRow, TrainingError, write_traffic
from metier.specializers import Recipe, Shelf, produce
from metier.specializers.checkpoints.checkpoint_files import CheckpointReader
from metier.specializers.checkpoints.compressed_tensors import linear_layers
from metier.specializers.checkpoints.quantisation_plan import Scheme
from metier.specializers.checkpoints.stored_weights import quantised_layers, read_dense
from metier.specializers.methods.msq.bits import bit_units
from metier.specializers.methods.msq.msq import served_schemes
from metier.specializers.methods.msq.quantiser import inside_range, lsb_distance, to_values
from metier.specializers.methods.msq.settings import MsqSettings
from metier.specializers.methods.msq.tuning import MsqObjective
from metier.specializers.recipes.stages import TRAINING_LOG
from metier.specializers.training.batches import EncodedRow, encode_rows
from metier.specializers.training.objective import Objective

SMALL: dict[str, Any] = {
    "target_bits": 5.0,
    "steps": 60,
    "finish_steps": 25,
    "drop_every_steps": 5,
    "batch_rows": 4,
    "warmup_steps": 1,
    "checkpoint_steps": 5,
    "learning_rate": 0.003,
    "schedule": "constant",
    "penalty": 3.0,
    "curvature": "hessian",
    "trace_probes": 1,
    "trace_rows": 2,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[TrafficRow]) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    write_traffic(place / "rows.jsonl", rows)
    return place


@pytest.fixture(scope="module")
def encoded(tiny_base: Path, rows: list[TrafficRow]) -> list[EncodedRow]:
    from transformers import AutoTokenizer

    return encode_rows(rows, AutoTokenizer.from_pretrained(tiny_base), max_row_tokens=200)


def recipe(folder: Path, **changes: Any) -> Recipe:
    fields = {"name": "few-bits", "data": {"traffic": "rows.jsonl"}, "folder": folder}
    return Recipe.model_validate({**fields, "methods": [{"method": "msq", **SMALL, **changes}]})


def objective_on(tiny_base: Path, encoded: list[EncodedRow], **changes: Any) -> MsqObjective:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    names = linear_layers(CheckpointReader(tiny_base))
    weights = {name: parameter for name, parameter in model.named_parameters() if name.removesuffix(".weight") in names}
    weights = {name.removesuffix(".weight"): parameter for name, parameter in weights.items()}
    return MsqObjective(model, MsqSettings(**{**SMALL, **changes}), weights, encoded, seed=0, pad_token=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, folder: Path, tiny_base: Path) -> tuple[Any, Path]:
    """One whole run, with what its objective ended with recorded beside it."""
    shelf = Shelf(tmp_path_factory.mktemp("msq") / "shelf")
    variant = produce(recipe(folder), shelf=shelf, base=tiny_base)
    return variant, shelf.path(variant)


def test_the_task_gradient_is_that_of_the_rounded_model(tiny_base: Path, encoded: list[EncodedRow]) -> None:
    objective = objective_on(tiny_base, encoded, penalty=0.0, start_bits=4, target_bits=4.0, clip=0.6)
    floats = {name: weight.detach().clone() for name, weight in objective.weights.items()}
    objective.add_gradients(encoded[:4], 0)
    found = {name: weight.grad.clone() for name, weight in objective.weights.items()}
    for name, weight in objective.weights.items():
        assert torch.equal(weight.detach(), floats[name])
        weight.grad = None
        weight.data.copy_(to_values(weight, objective.scales[name], 4))  # the oracle: a model of rounded weights
    Objective(objective.model, pad_token=0).loss(encoded[:4]).backward()
    outside = 0
    for name, weight in objective.weights.items():
        inside = inside_range(floats[name], objective.scales[name])
        assert torch.equal(found[name], torch.where(inside, weight.grad, 0.0))
        outside += int((~inside).sum())
    assert outside > 0


def test_the_penalty_is_measured_in_the_task_gradient(tiny_base: Path, encoded: list[EncodedRow]) -> None:
    plain, pulled = (objective_on(tiny_base, encoded, penalty=penalty) for penalty in (1e-12, 2.0))
    for objective in (plain, pulled):
        objective.add_gradients(encoded[:4], 0)
    for name, weight in pulled.weights.items():
        bits, drop = pulled.width(name), int(pulled.drops[pulled.units.index(_unit(pulled, name))])
        away = lsb_distance(weight, pulled.scales[name], bits, drop)
        task = plain.weights[name].grad
        assert torch.allclose(weight.grad, task + 2.0 * task.square().mean().sqrt() * away.sign(), rtol=1e-4, atol=1e-9)


def _unit(objective: MsqObjective, layer: str) -> Any:
    return next(unit for unit in objective.units if layer in unit.layers)


def test_training_needs_the_float_weights_and_no_more(tiny_base: Path, encoded: list[EncodedRow]) -> None:
    sizes = []
    for start in (4, 8):
        objective = objective_on(tiny_base, encoded, start_bits=start, target_bits=4.0)
        trained = sum(weight.numel() for weight in objective.weights.values())
        assert trained == sum(rows * inputs for rows, inputs in linear_layers(CheckpointReader(tiny_base)).values())
        sizes.append(sum(tensor.numel() for tensor in objective.state.values()))
    assert sizes[0] == sizes[1] < 100


def test_bits_fall_to_the_target_and_never_rise(made: tuple[Any, Path]) -> None:
    variant, place = made
    log = [json.loads(line) for line in (place / TRAINING_LOG).read_text().splitlines()]
    averages = [entry["average_bits"] for entry in log]
    assert averages[0] == 8.0 and averages[-1] <= 5.0
    assert all(after <= before for before, after in zip(averages, averages[1:], strict=False))
    assert variant.card["average_bits"] == pytest.approx(averages[-1], abs=1e-3)
    assert variant.card["dropped_anyway"] == 0
    assert set(variant.card["bits"]) == set(variant.card["served_bits"])
    for unit, width in variant.card["bits"].items():
        assert variant.card["served_bits"][unit] == (4 if width <= 4 else 8)
    assert "steps_from_fewer_bits" not in log[-1]  # at the target nothing pulls any more


def test_what_is_exported_is_what_was_trained(
    made: tuple[Any, Path], folder: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated: dict[str, torch.Tensor] = {}
    original = MsqObjective.rounded

    def record(self: MsqObjective) -> Iterator[tuple[str, torch.Tensor]]:
        for name, values in original(self):
            simulated[name] = values
            yield name, values

    monkeypatch.setattr(MsqObjective, "rounded", record)
    variant = produce(recipe(folder), shelf=Shelf(tmp_path / "again"), base=tiny_base)
    assert variant.id == made[0].id
    reader = CheckpointReader(made[1] / "weights")
    assert quantised_layers(reader) == simulated.keys()
    for name, values in simulated.items():
        assert torch.equal(read_dense(reader, f"{name}.weight", torch.float32), values)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(reader.read(norm), CheckpointReader(tiny_base).read(norm))  # norms are trained too


def test_it_keeps_what_uniform_training_of_the_same_size_keeps(
    made: tuple[Any, Path], folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    uniform = produce(recipe(folder, allocation="uniform"), shelf=Shelf(tmp_path / "shelf"), base=tiny_base)
    assert set(uniform.card["bits"].values()) == {5} and uniform.card["average_bits"] == 5.0
    # The search is done 25 steps before the end; from about ln(500) at the start both come under 1.
    assert made[0].card["final_loss"] < uniform.card["final_loss"] + 0.2 < 1


def test_whole_blocks_are_ranked_by_what_they_change(folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    settings = {"allocation": "layers", "min_bits": 4, "target_bits": 6.0, "steps": 4, "finish_steps": 0}
    variant = produce(recipe(folder, **settings), shelf=Shelf(tmp_path / "shelf"), base=tiny_base)
    by_block = [{w for u, w in variant.card["bits"].items() if f".{block}." in u} for block in (0, 1)]
    assert by_block in ([{4}, {8}], [{8}, {4}])


def test_without_a_penalty_nothing_is_dropped(
    folder: Path, tiny_base: Path, tmp_path: Path, encoded: list[EncodedRow]
) -> None:
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(RecipeError, match=r"penalty: 0.*without a penalty no low bit is cleared"):
        recipe(folder, penalty=0)
    variant = produce(recipe(folder, penalty=0, on_missed="drop"), shelf=shelf, base=tiny_base)
    log = [json.loads(line) for line in (shelf.path(variant) / TRAINING_LOG).read_text().splitlines()]
    assert [entry["average_bits"] for entry in log[:35]] == [8.0] * 35
    assert variant.card["average_bits"] <= 5.0 and variant.card["dropped_anyway"] > 0


@pytest.mark.parametrize("stop_after", [22, 25])
def test_a_stopped_run_ends_with_the_same_bytes(
    made: tuple[Any, Path], folder: Path, tiny_base: Path, tmp_path: Path, stop_after: int
) -> None:
    shelf = Shelf(tmp_path / "shelf")

    def stop(progress: Any) -> None:
        if progress.step == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce(recipe(folder), shelf=shelf, base=tiny_base, on_progress=stop)
    assert shelf.list() == []
    steps: list[int] = []
    again = produce(recipe(folder), shelf=shelf, base=tiny_base, on_progress=lambda p: steps.append(p.step))
    assert steps[0] == stop_after // 5 * 5 + 1
    assert again.id == made[0].id


def test_a_target_out_of_reach_is_said(folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"target_bits: 2.5.*an average from min_bits=3 to start_bits=8"):
        recipe(folder, target_bits=2.5)
    with pytest.raises(RecipeError, match=r"target_bits: 3.*at least 4, since 2 rounds fit"):
        recipe(folder, target_bits=3, drop_every_steps=15)
    with pytest.raises(RecipeError, match=r"target_bits: 4.5.*a whole number of bits"):
        recipe(folder, target_bits=4.5, allocation="uniform")
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(TrainingError, match=r"target of 5.0 bits is out of reach: the average is 8.00.*on_missed"):
        produce(recipe(folder, nonzero_below=0.0), shelf=shelf, base=tiny_base)
    assert shelf.list() == []
    assert list((shelf.folder / ".work").glob("*/0-msq/checkpoint.safetensors"))  # the last state is kept


def test_other_bad_inputs_are_named(folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(RecipeError, match="group_size=48 does not divide the 128 inputs"):
        produce(recipe(folder, group_size=48), shelf=shelf, base=tiny_base)
    quantised = [{"method": "ptq", "scheme": "w8a8"}, {"method": "msq", **SMALL}]
    fields = {"name": "twice", "data": {"traffic": "rows.jsonl"}, "folder": folder, "methods": quantised}
    with pytest.raises(RecipeError, match="quantised already|weights to tune are quantised"):
        parent = Recipe.model_validate({**fields, "methods": quantised[:1]})
        produce(parent, shelf=shelf, base=tiny_base)
        produce(recipe(folder).model_copy(update={"parent": "twice"}), shelf=shelf, base=tiny_base)


def test_numbers_that_are_not_finite_stop_it_and_the_last_good_state_is_kept(
    made: tuple[Any, Path], folder: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = MsqObjective.add_gradients

    def ill(self: MsqObjective, rows: Any, step: int) -> dict[str, float]:
        measured = healthy(self, rows, step)
        if step == 12:
            next(iter(self.weights.values())).grad[0, 0] = float("nan")  # type: ignore[index]
        return measured

    shelf = Shelf(tmp_path / "shelf")
    monkeypatch.setattr(MsqObjective, "add_gradients", ill)
    with pytest.raises(TrainingError, match="step 13 of 60.*the checkpoint before this step is kept"):
        produce(recipe(folder), shelf=shelf, base=tiny_base)
    monkeypatch.undo()
    steps: list[int] = []
    again = produce(recipe(folder), shelf=shelf, base=tiny_base, on_progress=lambda p: steps.append(p.step))
    assert steps[0] == 11 and again.id == made[0].id


def test_widths_without_a_kernel_are_served_by_the_next_wider_one() -> None:
    layers = {f"model.layers.0.mlp.{name}_proj": (64, 96) for name in ("gate", "up", "down")}
    units = bit_units(layers)

    def served(gate_up: int, down: int, group_size: int | None = None) -> list[Scheme | None]:
        bits = {"model.layers.0.gate_up": gate_up, "model.layers.0.down": down}
        found = served_schemes(bits, units, layers, group_size=group_size)
        return [found.get(f"model.layers.0.mlp.{name}_proj") for name in ("gate", "down")]

    assert served(3, 4) == [Scheme(4, 32), Scheme(4, 32)]  # 96 inputs: neither 128 nor 64 divides them
    assert served(5, 8) == [Scheme(8), Scheme(8)]
    assert served(4, 5, group_size=48) == [Scheme(4, 48), None]  # int8 has one scale per channel
    odd = {"model.layers.0.mlp.down_proj": (60, 96)}
    found = served_schemes({"model.layers.0.down": 3}, bit_units(odd), odd, group_size=None)
    assert found == {"model.layers.0.mlp.down_proj": Scheme(8)}  # the int4 kernel wants multiples of 32
