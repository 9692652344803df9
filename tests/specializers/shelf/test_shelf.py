"""The shelf keeps variants whole, by content, and finds them again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from metier.agents import UnknownVariantError, VariantError
from metier.specializers import AskSpec, EngineSpec, Shelf, Variant
from metier.specializers.shelf.variant import content_id


def record(**more: Any) -> dict[str, Any]:
    return {"base": "b" * 16, "prompt_layout": 1, "engine": EngineSpec(base="b" * 16), **more}


def stage(folder: Path, text: str = "weights") -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_text(text)
    return folder


def put(shelf: Shelf, name: str, text: str = "weights", **more: Any) -> Variant:
    return shelf.add(stage(shelf.folder.parent / f"staging-{name}", text), name=name, record=record(**more))


def test_a_variant_is_found_by_name_and_by_id(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    variant = put(shelf, "solver", ask=AskSpec(adapter="lora", rank=8), card={"loss": 0.5})
    assert shelf.get("solver") == shelf.get(variant.id) == variant
    assert shelf.path(variant) == shelf.path("solver") == tmp_path / "shelf" / variant.id
    assert (shelf.path(variant) / "adapter" / "adapter_model.safetensors").read_text() == "weights"
    assert list(variant.files) == ["adapter/adapter_model.safetensors"]
    assert not (tmp_path / "staging-solver").exists()
    shelf.verify(variant)


def test_the_id_covers_weights_and_recipe_but_neither_name_nor_card(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    first = put(shelf, "one", card={"loss": 0.5})
    same = put(shelf, "two", card={"loss": 0.4})
    assert same.id == first.id
    assert [v.name for v in shelf.list()] == ["two"]
    assert shelf.get(first.id).card == {"loss": 0.4}
    assert put(shelf, "three", text="other").id != first.id
    assert put(shelf, "four", seed=1).id != first.id


def test_a_record_keeps_the_id_it_had_when_variants_were_first_made() -> None:
    recipe = {"name": "zähler", "methods": [{"method": "lora", "rank": 8, "learning_rate": 0.001}]}
    made = {"base": "0123456789abcdef", "parent": None, "recipe": recipe, "seed": 7, "data": "ab", "prompt_layout": 1}
    assert content_id({**made, "id": "x", "name": "n", "card": {"a": 1}}) == "6f388b078e901c6a"


def test_a_name_means_the_variant_added_last(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    old = put(shelf, "solver", text="old")
    new = put(shelf, "solver", text="new")
    assert shelf.get("solver").id == new.id
    assert shelf.get(old.id).id == old.id
    assert [v.id for v in shelf.list()] == [new.id, old.id]


def test_shipped_folders_are_used_in_place_after_the_own_ones(tmp_path: Path) -> None:
    author = Shelf(tmp_path / "author")
    shipped = put(author, "solver", text="shipped")
    put(author, "critic", text="critic")
    for name in ("solver", "critic"):
        author.export(name, tmp_path / "examples" / name)
    shelf = Shelf(tmp_path / "shelf", also=[tmp_path / "examples"])
    assert shelf.get("solver").id == shipped.id
    assert shelf.path("solver") == tmp_path / "examples" / "solver"
    shelf.verify("solver")
    own = put(shelf, "solver", text="own")
    assert shelf.get("solver").id == own.id
    assert len(shelf.list()) == 3
    with pytest.raises(VariantError, match="expected one on the shelf"):
        shelf.remove(shipped.id)
    shelf.remove(own)
    assert shelf.get("solver").id == shipped.id


def test_one_folder_is_a_shelf_of_its_own(tmp_path: Path) -> None:
    author = Shelf(tmp_path / "author")
    variant = put(author, "solver")
    assert Shelf(tmp_path / "none", also=[author.path(variant)]).get("solver") == variant


def test_an_unknown_variant_is_named_with_what_is_there(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(UnknownVariantError, match="the shelf is empty"):
        shelf.get("solver")
    put(shelf, "solver")
    put(shelf, "critic", text="other")
    with pytest.raises(UnknownVariantError, match=r"'solvr'.*critic, solver.*Did you mean 'solver'"):
        shelf.get("solvr")


@pytest.mark.parametrize("harm", ["changed", "missing", "extra", "record"])
def test_verify_names_what_was_harmed(tmp_path: Path, harm: str) -> None:
    shelf = Shelf(tmp_path / "shelf")
    folder = shelf.path(put(shelf, "solver"))
    weights = folder / "adapter" / "adapter_model.safetensors"
    if harm == "changed":
        weights.write_text("weightz")
    elif harm == "missing":
        weights.unlink()
    elif harm == "extra":
        (folder / "adapter" / "note.txt").write_text("")
    else:
        text = json.loads((folder / "variant.json").read_text())
        (folder / "variant.json").write_text(json.dumps({**text, "seed": 7}))
    named = {"record": "changed by hand", "extra": "note.txt"}.get(harm, "adapter_model.safetensors")
    with pytest.raises(VariantError, match=named):
        shelf.verify("solver")


BAD_RECORDS: dict[str, bytes] = {
    "too few fields": b'{"id": "x"}',
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "deep": b'{"card": ' + b"[" * 100_000,
    "a large number": b'{"seed": 1' + b"0" * 5000 + b"}",
    "half a character": b'{"name": "\\ud800"}',
    "a key twice": b'{"id": "x", "id": "y"}',
}


@pytest.mark.parametrize("bad", [*BAD_RECORDS, "a pipe", "a folder", "a link to nothing"])
def test_a_record_that_is_none_is_named_and_the_rest_of_the_shelf_works(tmp_path: Path, bad: str) -> None:
    shelf = Shelf(tmp_path / "shelf")
    other = put(shelf, "critic", text="other")
    folder = shelf.path(put(shelf, "solver"))
    path = folder / "variant.json"
    path.unlink()
    if bad == "a pipe":
        os.mkfifo(path)
    elif bad == "a folder":
        path.mkdir()
    elif bad == "a link to nothing":
        path.symlink_to(tmp_path / "nothing")
    else:
        path.write_bytes(BAD_RECORDS[bad])
    assert shelf.list() == [other] and shelf.get("critic") == other
    ((where, error),) = shelf.damaged()
    assert where == folder and "variant.json is no variant record" in str(error)
    with pytest.raises(VariantError, match=r"variant\.json is no variant record"):
        shelf.get(folder.name)
    with pytest.raises(UnknownVariantError):
        shelf.get("solver")


def test_export_ships_regular_files_of_the_record_only_and_says_what_it_left_out(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    folder = shelf.path(put(shelf, "solver"))
    (tmp_path / "secret").write_text("of someone")
    (folder / "note.txt").symlink_to(tmp_path / "secret")
    (folder / "more").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    left_out: list[str] = []
    out = shelf.export("solver", tmp_path / "out", on_left_out=left_out.append)
    assert left_out == ["more", "note.txt", "pipe"]
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    assert files == ["adapter/adapter_model.safetensors", "variant.json"]


@pytest.mark.parametrize("link", ["adapter/adapter_model.safetensors", "adapter", "variant.json"])
def test_export_refuses_a_file_of_the_record_that_is_a_link(tmp_path: Path, link: str) -> None:
    shelf = Shelf(tmp_path / "shelf")
    folder = shelf.path(put(shelf, "solver"))
    (folder / link).rename(tmp_path / "outside")
    (folder / link).symlink_to(tmp_path / "outside")
    with pytest.raises(VariantError, match="no regular file"):
        shelf.export("solver", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unfinished_folders_are_never_listed(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    variant = put(shelf, "solver")
    stage(tmp_path / "shelf" / ".0123456789abcdef-killed")
    (tmp_path / "shelf" / "no-record").mkdir()
    assert shelf.list() == [variant]


def test_measurements_change_the_card_only(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    variant = put(shelf, "solver", card={"loss": 0.5})
    changed = shelf.annotate("solver", {"accuracy": 0.9})
    assert changed.id == variant.id
    assert shelf.get("solver").card == {"loss": 0.5, "accuracy": 0.9}
    shelf.verify("solver")


def test_measuring_an_older_variant_does_not_make_it_the_latest(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    old = put(shelf, "solver", text="old")
    new = put(shelf, "solver", text="new")
    shelf.annotate(old, {"accuracy": 0.9})
    assert shelf.get("solver").id == new.id


def test_a_shelf_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "shelf").write_text("a file where the shelf should be")
    staging = stage(tmp_path / "staging")
    with pytest.raises(VariantError, match="cannot be put on the shelf"):
        Shelf(tmp_path / "shelf").add(staging, name="solver", record=record())
    assert (staging / "adapter" / "adapter_model.safetensors").read_text() == "weights"


def test_export_refuses_a_folder_that_exists(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    put(shelf, "solver")
    (tmp_path / "out").mkdir()
    with pytest.raises(VariantError, match="expected a new folder"):
        shelf.export("solver", tmp_path / "out")
