"""From a recipe to a variant: the same recipe gives the same bytes, also after kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metier.agents import (
    AdapterError,
    RecipeError,
    TrafficRow,
    TrainingError,
    UnknownVariantError,
    VariantError,
    write_traffic,
)
from metier.agents.chat.chat_template import TemplateSettings
from metier.agents.thinking import ThinkingTags
from metier.specializers import AskSpec, Recipe, Shelf, base_fingerprint, check_variant, produce
from metier.specializers.recipes.stages import TRAINING_LOG
from metier.specializers.shelf.file_lock import exclusive
from tests.tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[TrafficRow]) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    write_traffic(place / "rows.jsonl", rows)
    return place


def recipe(folder: Path, **changes: Any) -> Recipe:
    method = {"method": "lora", "rank": 4, "steps": 4, "batch_rows": 4, "warmup_steps": 1, "checkpoint_steps": 1}
    fields = {
        "name": "solver",
        "data": {"traffic": "rows.jsonl"},
        "methods": [{**method, **changes.pop("method", {})}],
        "folder": folder,
    }
    return Recipe.model_validate({**fields, **changes})


def test_a_recipe_becomes_a_variant_that_can_be_served(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    seen: list[int] = []
    variant = produce(
        recipe(folder), shelf=shelf, base=tiny_base, on_progress=lambda progress: seen.append(progress.step)
    )
    assert seen == [1, 2, 3, 4]
    assert variant.name == "solver"
    assert variant.ask == AskSpec(adapter="lora", rank=4)
    assert variant.base == variant.engine.base == base_fingerprint(tiny_base)
    shelf.verify(variant)
    place = shelf.path(variant)
    facts = check_variant(variant, place, tiny_base, slot_rank=4)
    assert facts is not None and facts.dtype == "BF16" and facts.scaling == 4.0
    assert sorted(variant.files) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        TRAINING_LOG,
    ]
    log = [json.loads(line) for line in (place / TRAINING_LOG).read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert variant.card["steps"] == 4 and variant.card["rows"] == 36
    assert str(tmp_path) not in (place / "variant.json").read_text()
    assert str(tiny_base) not in (place / "adapter" / "adapter_config.json").read_text()
    assert [p.name for p in shelf.folder.iterdir() if not p.name.startswith(".")] == [variant.id]


def test_peft_itself_loads_what_was_saved(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shelf = Shelf(tmp_path / "shelf")
    variant = produce(recipe(folder, method={"learning_rate": 0.01}), shelf=shelf, base=tiny_base)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokens = torch.arange(5, 25)[None]
    before = plain(tokens).logits
    after = PeftModel.from_pretrained(plain, shelf.path(variant) / "adapter")(tokens).logits
    assert (after - before).abs().max() > 0.01


def test_the_same_recipe_is_not_made_twice(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    first = produce(recipe(folder), shelf=shelf, base=tiny_base)

    def never(_progress: object) -> None:
        raise AssertionError("trained again")

    assert produce(recipe(folder), shelf=shelf, base=tiny_base, on_progress=never) == first
    again = produce(recipe(folder), shelf=Shelf(tmp_path / "other"), base=tiny_base)
    assert again.id == first.id  # elsewhere it is made again, to the same bytes
    assert produce(recipe(folder, seed=1), shelf=shelf, base=tiny_base).id != first.id


def test_arguments_of_the_chat_template_are_part_of_a_variant(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf, quiet = Shelf(tmp_path / "shelf"), TemplateSettings(args={"enable_thinking": False})
    usual = produce(recipe(folder), shelf=shelf, base=tiny_base)
    other = produce(recipe(folder), shelf=shelf, base=tiny_base, template=quiet)
    assert "chat_template_args" not in usual.model_dump() and other.chat_template_args == quiet.args
    tags = TemplateSettings(tags=ThinkingTags(open="<reason>", close="</reason>", empty="<reason></reason>"))
    tagged = produce(recipe(folder), shelf=shelf, base=tiny_base, template=tags)
    assert "thinking_tags" not in usual.model_dump() and tagged.template == tags
    assert len({usual.id, other.id, tagged.id}) == 3
    for template, made in ((TemplateSettings(), usual), (quiet, other), (tags, tagged)):
        assert produce(recipe(folder), shelf=shelf, base=tiny_base, template=template).id == made.id


def test_training_goes_on_from_a_parent(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    parent = produce(recipe(folder, method={"learning_rate": 0.01}), shelf=shelf, base=tiny_base)
    child = produce(recipe(folder, name="child", parent="solver"), shelf=shelf, base=tiny_base)
    assert child.parent == parent.id
    first = [json.loads((shelf.path(v) / TRAINING_LOG).read_text().splitlines()[0])["loss"] for v in (parent, child)]
    assert first[1] < first[0]
    with pytest.raises(RecipeError, match="rank 8 differs from the parent adapter's rank 4"):
        produce(recipe(folder, parent="solver", method={"rank": 8}), shelf=shelf, base=tiny_base)


def test_parents_that_do_not_fit_are_named(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(UnknownVariantError, match="no variant 'teacher'"):
        produce(recipe(folder, parent="teacher"), shelf=shelf, base=tiny_base)
    produce(recipe(folder), shelf=shelf, base=tiny_base)
    twin = write_tiny_llama(tmp_path / "twin", seed=1)
    with pytest.raises(RecipeError, match="descends from base"):
        produce(recipe(folder, name="child", parent="solver"), shelf=shelf, base=twin)
    with pytest.raises(AdapterError, match="was made for base"):
        check_variant(shelf.get("solver"), shelf.path("solver"), twin, slot_rank=8)


def test_what_does_not_fit_is_said_before_training(
    tmp_path: Path, folder: Path, tiny_base: Path, rows: list[TrafficRow]
) -> None:
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(RecipeError, match=r"targets \['w_proj'\].*q_proj"):
        produce(recipe(folder, method={"targets": ["w_proj"]}), shelf=shelf, base=tiny_base)
    write_traffic(tmp_path / "old.jsonl", [row.model_copy(update={"prompt_layout": 99}) for row in rows])
    with pytest.raises(RecipeError, match="prompt layout 99; expected at most layout"):
        produce(recipe(tmp_path, data={"traffic": "old.jsonl"}), shelf=shelf, base=tiny_base)
    with pytest.raises(TrainingError, match="max_row_tokens=10"):
        produce(recipe(folder, method={"max_row_tokens": 10}), shelf=shelf, base=tiny_base)
    assert shelf.list() == []


def test_a_shelf_that_cannot_be_written_is_said_before_training(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    (tmp_path / "shelf").write_text("a file where the shelf should be")
    with pytest.raises(VariantError, match="cannot be made"):
        produce(recipe(folder), shelf=Shelf(tmp_path / "shelf"), base=tiny_base)


def test_two_processes_do_not_make_the_same_variant(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    work = tmp_path / "work"

    def try_again(_progress: object) -> None:
        (job,) = work.iterdir()
        with exclusive(job / "lock", wait=False) as alone:
            assert not alone
        with pytest.raises(TrainingError, match="another process is making 'solver'"):
            produce(recipe(folder), shelf=Shelf(tmp_path / "shelf"), base=tiny_base, work_dir=work)

    produce(recipe(folder), shelf=Shelf(tmp_path / "shelf"), base=tiny_base, work_dir=work, on_progress=try_again)


KILLED = """
import os, signal, sys
from pathlib import Path
from metier.specializers import Recipe, Shelf, produce

def kill(progress):
    if progress.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe.model_validate_json(sys.argv[1]).model_copy(update={"folder": Path(sys.argv[2])})
produce(recipe, shelf=Shelf(Path(sys.argv[3])), base=Path(sys.argv[4]), on_progress=kill)
"""


def test_a_run_killed_in_the_middle_goes_on_to_the_same_bytes(tmp_path: Path, folder: Path, tiny_base: Path) -> None:
    wanted = recipe(folder, method={"checkpoint_steps": 2})
    shelf = Shelf(tmp_path / "shelf")
    arguments = [wanted.model_dump_json(), str(folder), str(shelf.folder), str(tiny_base)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert shelf.list() == []
    (spent,) = (shelf.folder / ".work").rglob("cpu_s")
    assert float(spent.read_text()) > 0
    spent.write_text("1000.0")  # far more than this test takes, to be seen in the sum
    seen: list[int] = []
    variant = produce(wanted, shelf=shelf, base=tiny_base, on_progress=lambda p: seen.append(p.step))
    assert seen == [3, 4]  # the last checkpoint was after step 2
    assert 1000 < variant.card["cpu_s"] < 2000
    whole = produce(wanted, shelf=Shelf(tmp_path / "whole"), base=tiny_base)
    assert variant.id == whole.id
    assert not list((shelf.folder / ".work").iterdir())
