"""`metier doctor --measure`: what is tried, and that a type which cannot be computed here is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metier.agents.errors import EngineError, SettingsError
from metier.runtime.cli import measure
from metier.runtime.cli.measure import measure_speed, thread_counts
from metier.runtime.engines import engine_timing
from metier.specializers.machine.measured_speed import Timing, known_speed
from metier.specializers.machine.number_types import engine_number_type, training_number_type
from metier.specializers.methods import training_timing
from tests.tiny_model import write_tiny_llama


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "usable_cores", lambda: 4)
    monkeypatch.setattr(measure, "others_busy", lambda: 0.0)
    return write_tiny_llama(tmp_path / "tiny", dtype="bfloat16")


@pytest.mark.parametrize("fastest", ["bfloat16", "float32"])
def test_the_cheaper_type_is_tried_on_more_threads_and_used_from_then_on(
    base: Path, fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, int]] = []

    async def time_engine(weights: Path, *, dtype: str, threads: int) -> Timing:
        tried.append((dtype, threads))
        cpu_s = 1.0 if dtype == fastest else 2.0
        return Timing(dtype=dtype, threads=threads, seconds=cpu_s / threads, cpu_s=cpu_s)

    monkeypatch.setattr(engine_timing, "time_engine", time_engine)
    speed = measure_speed(str(base))
    assert thread_counts() == (1, 2, 4)
    assert tried == [("bfloat16", 1), ("float32", 1), (fastest, 2), (fastest, 4)]
    assert {timing.dtype for timing in speed.training} == {"bfloat16", "float32"}, "really trained"
    assert known_speed(speed.base) == speed
    assert engine_number_type(base, "auto").dtype == fastest
    assert training_number_type("cpu", "auto").dtype == speed.fastest(speed.training)


def test_a_type_that_does_not_start_is_left_out(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def time_engine(weights: Path, *, dtype: str, threads: int) -> Timing:
        if dtype == "bfloat16":
            raise EngineError("no kernel")
        return Timing(dtype=dtype, threads=threads, seconds=1.0, cpu_s=1.0)

    def no_training(model: Path, *, dtype: str, threads: int) -> Timing:
        return Timing(dtype=dtype, threads=threads, seconds=1.0, cpu_s=1.0)

    monkeypatch.setattr(engine_timing, "time_engine", time_engine)
    monkeypatch.setattr(training_timing, "time_training", no_training)
    speed = measure_speed(str(base))
    assert {timing.dtype for timing in speed.engine} == {"float32"}
    assert speed.threads_worth(speed.engine) == 1, "four threads were no faster"


def test_a_base_that_leaves_no_choice_is_refused(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(SettingsError, match="nothing to measure"):
        measure_speed(str(base))
