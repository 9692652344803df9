"""Variants to a hub of ours on loopback and back: checked whole, and nothing else is sent or fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from metier.agents import AdapterError, UnknownVariantError, VariantError
from metier.specializers import Shelf
from metier.specializers.adapters.adoption import adopt_adapter
from metier.specializers.adapters.hub import MOST_FILES, pull_variant, push_variant
from tests.specializers.adapters.loopback_hub import LoopbackHub, loopback_hub
from tests.tiny_model import write_random_lora

REPO = "ann/solver"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub of ours stores by Git LFS alone
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with loopback_hub() as hub:
        yield hub


@pytest.fixture
def shelf(tmp_path: Path, tiny_base: Path) -> Shelf:
    """A shelf with one variant, `solver`, and a stray file beside its own."""
    shelf = Shelf(tmp_path / "shelf")
    variant = adopt_adapter(
        write_random_lora(tmp_path / "lora", tiny_base, rank=4), name="solver", shelf=shelf, base=tiny_base
    )
    (shelf.path(variant) / "notes.txt").write_text("mine alone")
    return shelf


def test_a_variant_goes_there_and_comes_back_the_same(
    hub: LoopbackHub, shelf: Shelf, tmp_path: Path, tiny_base: Path
) -> None:
    sent = shelf.get("solver")
    assert push_variant("solver", REPO, shelf=shelf, endpoint=hub.url).startswith(f"{hub.url}/{REPO}/commit/")
    assert set(hub.repos[REPO]) == {"variant.json", *sent.files} and hub.private[REPO]
    other, told = Shelf(tmp_path / "other"), dict[str, int]()
    back = pull_variant(REPO, shelf=other, base=tiny_base, endpoint=hub.url, on_file=told.__setitem__)
    assert (back.id, back.name, back.files) == (sent.id, "solver", sent.files)
    other.verify(back)
    assert told == {file: len(data) for file, data in hub.repos[REPO].items()}
    push_variant("solver", REPO, shelf=shelf, endpoint=hub.url)  # again, to the repository that is there now
    named = pull_variant(REPO, name="theirs", shelf=other, base=tiny_base, endpoint=hub.url, revision="main")
    assert (named.id, named.name) == (sent.id, "theirs")
    assert not [*(other.folder / ".work").glob("*")] and not [*(shelf.folder / ".work").glob("*")]


def test_an_adapter_of_others_comes_without_what_could_be_run(
    hub: LoopbackHub, shelf: Shelf, tmp_path: Path, tiny_base: Path
) -> None:
    folder = write_random_lora(tmp_path / "theirs", tiny_base, rank=8)
    hub.repos["bo/Adapter"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.repos["bo/Adapter"] |= {"modeling.py": b"import os", "adapter_model.bin": b"pickle", "README.md": b"# mine"}
    variant = pull_variant("bo/Adapter", shelf=shelf, base=tiny_base, endpoint=hub.url)
    assert variant.name == "adapter" and variant.ask.rank == 8
    assert not [one for one in hub.requests if any(name in one for name in ("modeling", ".bin", "README"))]


def test_what_was_changed_or_lacks_something_is_refused_and_leaves_nothing(
    hub: LoopbackHub, shelf: Shelf, tmp_path: Path, tiny_base: Path
) -> None:
    push_variant("solver", REPO, shelf=shelf, endpoint=hub.url)
    whole, other = dict(hub.repos[REPO]), Shelf(tmp_path / "other")
    weights = "adapter/adapter_model.safetensors"
    record = json.loads(whole["variant.json"])
    cases: list[tuple[dict[str, bytes], str]] = [
        ({weights: whole[weights][:-4] + b"\0\0\0\1"}, "is not what its record says"),
        ({"variant.json": b"{}"}, "variant record"),
        ({"variant.json": json.dumps(record | {"files": {"../../evil": "0" * 64}}).encode()}, "evil"),
        (
            {"variant.json": json.dumps(record | {"files": {"weights/model.bin": "0" * 64}}).encode()},
            "run code",
        ),
        ({"variant.json": json.dumps(record | {"files": {"gone.txt": "0" * 64}}).encode()}, "gone.txt"),
        ({f"{number}.txt": b"" for number in range(MOST_FILES)}, f"more than {MOST_FILES} files"),
    ]
    for change, said in cases:
        hub.repos[REPO] = whole | change
        with pytest.raises(VariantError, match=said):
            pull_variant(REPO, shelf=other, base=tiny_base, endpoint=hub.url)
    hub.repos[REPO] = {file: data for file, data in whole.items() if file != weights}
    with pytest.raises(VariantError, match=f"lacks {weights}"):
        pull_variant(REPO, shelf=other, base=tiny_base, endpoint=hub.url)
    hub.repos[REPO] = whole
    hub.requests.clear()
    with pytest.raises(VariantError, match="--max-gib"):
        pull_variant(REPO, shelf=other, base=tiny_base, endpoint=hub.url, max_gib=1e-9)
    assert not [one for one in hub.requests if weights in one]
    hub.repos[REPO] = {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}
    with pytest.raises(VariantError, match="other formats are not fetched"):
        pull_variant(REPO, shelf=other, base=tiny_base, endpoint=hub.url)
    hub.repos[REPO] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"no tensors"}
    with pytest.raises(AdapterError):
        pull_variant(REPO, shelf=other, base=tiny_base, endpoint=hub.url)
    assert other.list() == [] and not [*(other.folder / ".work").glob("*")]


def test_a_hub_that_is_away_or_knows_nothing_is_named(hub: LoopbackHub, shelf: Shelf, tiny_base: Path) -> None:
    with pytest.raises(VariantError, match="fetched from repository ann/nothing"):
        pull_variant("ann/nothing", shelf=shelf, base=tiny_base, endpoint=hub.url)
    with pytest.raises(VariantError, match="fetched from repository a/b/c"):
        pull_variant("a/b/c", shelf=shelf, base=tiny_base, endpoint=hub.url)
    with pytest.raises(UnknownVariantError):
        push_variant("nobody", REPO, shelf=shelf, endpoint=hub.url)
    assert "POST" not in "".join(hub.requests)
    with pytest.raises(VariantError, match="sent to repository ann/solver"):
        push_variant("solver", REPO, shelf=shelf, endpoint="http://127.0.0.1:9")
