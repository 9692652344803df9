"""What a start says of how long it will take: what starts took on this machine before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from metier.runtime.engines.start_times import ENGINES_KEPT, FILE, note_start, start_note
from metier.runtime.engines.variant_targets import EngineStart
from metier.runtime.settings.engine import EngineSettings

START = EngineStart("base", Path("weights"), "float32", True, EngineSettings())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_machine_that_has_started_nothing_promises_nothing() -> None:
    assert "one to three minutes for us" in start_note(START)
    assert start_note(replace(START, settings=EngineSettings(eager=True))) == "loads the model"


def test_a_start_is_expected_to_take_what_it_took() -> None:
    note_start(START, 111.4)
    assert start_note(START) == "loads the model, which took 111 s the last time here"
    note_start(START, 6.2)
    assert start_note(START) == "loads the model, which took 6 s the last time here"


def test_another_engine_is_told_what_first_starts_of_such_models_took(tmp_path: Path) -> None:
    def sized(name: str, size: int) -> EngineStart:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
        return replace(START, weights=tmp_path / name)

    base, alike, tiny = sized("base", 1000), sized("alike", 1200), sized("tiny", 10)
    note_start(tiny, 3.0)
    note_start(replace(base, settings=EngineSettings(eager=True)), 4.0)
    assert "one to three minutes" in start_note(base)
    note_start(base, 147.0)
    note_start(base, 5.0)
    assert start_note(alike).endswith("a first start with as large a model took up to 147 s here")
    assert start_note(replace(tiny, dtype="bfloat16")).endswith("up to 3 s here")


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": ["x", 2]}'])
def test_a_file_that_cannot_be_read_is_written_anew(cache: Path, text: str) -> None:
    cache.mkdir()
    (cache / FILE).write_text(text)
    assert "one to three minutes" in start_note(START)
    note_start(START, 8.0)
    assert "took 8 s" in start_note(START)


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.write_text("a file in the way")
    note_start(START, 8.0)
    assert "one to three minutes" in start_note(START)


def test_it_keeps_the_newest(cache: Path) -> None:
    for number in range(ENGINES_KEPT + 3):
        note_start(replace(START, weights=Path(str(number))), 8.0)
    assert len(json.loads((cache / FILE).read_text())) == ENGINES_KEPT
    assert "took 8 s the last time" in start_note(replace(START, weights=Path(str(ENGINES_KEPT + 2))))
    assert "the last time" not in start_note(replace(START, weights=Path("0")))
