"""Methods that make weights, alone and in chains: what ends up on the shelf, and what a kill or a full disk leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from metier.agents import TrafficRow, VariantError, write_traffic
from metier.specializers import AskSpec, Recipe, Shelf, Variant, base_fingerprint, check_base, check_weights, produce
from metier.specializers.adapters.adapter_check import check_adapter
from metier.specializers.checkpoints.self_check import make_self_check, read_self_check
from metier.specializers.methods.method import METHODS
from tests.tiny_model import write_tiny_llama

SCALED = {"method": "scaled", "factor": 0.5}
LORA = {"method": "lora", "rank": 4, "steps": 3, "batch_rows": 4, "warmup_steps": 1, "checkpoint_steps": 1}


@pytest.fixture(autouse=True)
def scaled_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "scaled", "tests.specializers.scaled_weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[TrafficRow]) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    write_traffic(place / "rows.jsonl", rows)
    return place


def recipe(folder: Path, *methods: dict[str, Any], **fields: Any) -> Recipe:
    given = {"name": "small", "data": {"traffic": "rows.jsonl"}, "methods": methods, "folder": folder}
    return Recipe.model_validate({**given, **fields})


def last_norm(shelf: Shelf, variant: Variant) -> float:
    return float(load_file(shelf.path(variant) / "weights" / "model.safetensors")["model.norm.weight"][0])


def test_new_weights_are_a_whole_checkpoint_of_their_own(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    variant = produce(recipe(folder, SCALED), shelf=shelf, base=tiny_base)
    assert (variant.engine.weights, variant.checkpoint, variant.ask) == ("own", variant.id, AskSpec())
    weights = shelf.path(variant) / "weights"
    assert {path.name for path in weights.iterdir()} == {path.name for path in tiny_base.iterdir()}
    check_base(weights)
    check_weights(variant, weights, tiny_base)
    shelf.verify(variant)
    assert read_self_check(variant.card) == read_self_check({"self_check": make_self_check(weights)})
    assert variant.card["factor"] == 0.5 and last_norm(shelf, variant) == 0.5
    # Unlike the base, whose fingerprint says what the variant descends from.
    assert base_fingerprint(weights) != base_fingerprint(tiny_base) == variant.base
    assert produce(recipe(folder, SCALED), shelf=Shelf(tmp_path / "other"), base=tiny_base).id == variant.id


def test_each_method_starts_from_what_the_one_before_made(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    chain = recipe(folder, SCALED, LORA, {**SCALED, "factor": 0.25, "keep_adapter": True})
    variant = produce(chain, shelf=shelf, base=tiny_base)
    assert last_norm(shelf, variant) == 0.125
    assert variant.ask == AskSpec(adapter="lora", rank=4)
    place = shelf.path(variant)
    assert check_adapter(place / "adapter", place / "weights", slot_rank=8).rank == 4
    assert [stage["method"] for stage in variant.card["stages"]] == ["scaled", "lora", "scaled"]
    log = [json.loads(line)["method"] for line in (place / "training_log.jsonl").read_text().splitlines()]
    assert log == ["scaled", "lora", "lora", "lora"]
    assert not list((shelf.folder / ".work").iterdir())


def test_new_weights_drop_the_adapter_of_the_old_ones(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    variant = produce(recipe(folder, LORA, SCALED), shelf=shelf, base=tiny_base)
    assert variant.ask == AskSpec()
    assert not (shelf.path(variant) / "adapter").exists()


def test_children_stand_on_the_weights_of_their_ancestor(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    parent = produce(recipe(folder, SCALED), shelf=shelf, base=tiny_base)
    child = produce(recipe(folder, LORA, name="tuned", parent="small"), shelf=shelf, base=tiny_base)
    grandchild = produce(recipe(folder, LORA, name="more", parent="tuned", seed=1), shelf=shelf, base=tiny_base)
    assert child.checkpoint == grandchild.checkpoint == parent.id
    assert (child.engine.weights, grandchild.parent) == (parent.id, child.id)
    assert not (shelf.path(child) / "weights").exists()
    again = produce(recipe(folder, SCALED, name="again", parent="more"), shelf=shelf, base=tiny_base)
    assert (again.engine.weights, last_norm(shelf, again)) == ("own", 0.25)
    with pytest.raises(VariantError, match="holds the weights of more, tuned"):
        shelf.remove(parent)
    shelf.remove(again)


def test_weights_of_another_base_or_damaged_ones_are_refused(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    variant = produce(recipe(folder, SCALED), shelf=shelf, base=tiny_base)
    weights = shelf.path(variant) / "weights"
    twin = write_tiny_llama(tmp_path / "twin", seed=1)
    with pytest.raises(VariantError, match=f"'small' was made from base {variant.base}; expected the base in use"):
        check_weights(variant, weights, twin)
    model = weights / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(VariantError, match="weights of variant 'small' cannot be served: .*model.safetensors"):
        check_weights(variant, weights, tiny_base)


RUN = """
import resource, sys
from pathlib import Path
from metier.specializers import Recipe, Shelf, produce
from metier.specializers.methods.method import METHODS
from metier.specializers.checkpoints.self_check import make_self_check, read_self_check

METHODS["scaled"] = "tests.specializers.scaled_weights"
recipe = Recipe.model_validate_json(sys.argv[1]).model_copy(update={"folder": Path(sys.argv[2])})
if limit := int(sys.argv[5]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
produce(recipe, shelf=Shelf(Path(sys.argv[3])), base=Path(sys.argv[4]))
"""


def run_apart(wanted: Recipe, folder: Path, shelf: Shelf, base: Path, file_limit: int = 0) -> Any:
    arguments = [wanted.model_dump_json(), str(folder), str(shelf.folder), str(base), str(file_limit)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", RUN, *arguments], env=env, capture_output=True, text=True, check=False)


def test_a_kill_after_one_method_does_not_repeat_it(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    wanted = recipe(folder, LORA, {**SCALED, "die": True})
    assert run_apart(wanted, folder, shelf, tiny_base).returncode == -signal.SIGKILL
    assert shelf.list() == []
    (work,) = (shelf.folder / ".work").iterdir()
    done = (work / "0-lora" / "made.json").stat().st_mtime_ns
    assert run_apart(wanted, folder, shelf, tiny_base).returncode == -signal.SIGKILL
    assert (work / "0-lora" / "made.json").stat().st_mtime_ns == done
    assert (work / "1-scaled" / "out" / "weights" / "model.safetensors").exists()
    assert shelf.list() == []


def test_a_full_disk_leaves_nothing_half_on_the_shelf(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    wanted = recipe(folder, SCALED)
    failed = run_apart(wanted, folder, shelf, tiny_base, file_limit=100_000)
    assert "VariantError: variant 'small' cannot be written" in failed.stderr, failed.stderr
    assert shelf.list() == []
    assert [path.name for path in shelf.folder.iterdir()] == [".work"]
    variant = produce(wanted, shelf=shelf, base=tiny_base)
    shelf.verify(variant)
