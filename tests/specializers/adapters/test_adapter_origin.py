"""An adapter for another base is refused where that base is known, and said to be for another where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents import AdapterError
from metier.specializers import Shelf
from metier.specializers.adapters.adapter_origin import check_origin
from metier.specializers.adapters.adoption import adopt_adapter, merge_onto_shelf
from tests.specializers.adapters.test_adapter_check import change_config
from tests.tiny_model import write_random_lora, write_tiny_llama


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (None, None),
        ("", None),
        ("tiny", None),
        ("someone/tiny", None),
        ("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B"),
        ("/home/someone/checkpoints/step-300", "/home/someone/checkpoints/step-300"),
        ("a\0b", "a\\x00b"),
        (17, None),
    ],
)
def test_a_base_that_is_not_here_is_said(tmp_path: Path, tiny_base: Path, named: object, said: str | None) -> None:
    found = check_origin(tmp_path, {"base_model_name_or_path": named}, tiny_base, tiny_base)
    assert (found is None) == (said is None)
    if said is not None and "\0" not in str(named):
        assert said in str(found)


def test_a_known_base_is_compared_by_its_weights(tmp_path: Path, tiny_base: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    twin = write_tiny_llama(tmp_path / "twin", seed=1)
    adapter = write_random_lora(tmp_path / "adapter", twin, rank=4)
    for put in (adopt_adapter, merge_onto_shelf):
        with pytest.raises(AdapterError, match=rf"whose fingerprint is .*Add it with --base {twin}"):
            put(adapter, name="it", shelf=shelf, base=tiny_base)
    assert shelf.list() == []
    copy = write_tiny_llama(tmp_path / "copy")
    change_config(adapter, base_model_name_or_path=str(copy))
    assert "made_for" not in adopt_adapter(adapter, name="it", shelf=shelf, base=tiny_base).card
    change_config(adapter, base_model_name_or_path="org/other-model")
    assert adopt_adapter(adapter, name="it", shelf=shelf, base=tiny_base).card["made_for"] == "org/other-model"


def test_a_fetched_base_is_known_by_its_id(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    twin = write_tiny_llama(tmp_path / "twin", seed=1)
    held = {"org/same": tiny_base, "org/twin": twin}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file: str(held[name] / file) if name in held else None
    )
    assert check_origin(tmp_path, {"base_model_name_or_path": "org/same"}, tiny_base, tiny_base) is None
    with pytest.raises(AdapterError, match="'?org/twin'?, whose fingerprint"):
        check_origin(tmp_path, {"base_model_name_or_path": "org/twin"}, tiny_base, tiny_base)
