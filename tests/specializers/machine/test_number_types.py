"""What `auto` is, by processor and checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metier.specializers.machine import machine, number_types
from metier.specializers.machine.machine import Machine, processor_flags, this_machine
from metier.specializers.machine.measured_speed import MeasuredSpeed, Timing, note_speed
from metier.specializers.machine.number_types import engine_number_type, training_number_type
from tests.tiny_families import write_tiny_family
from tests.tiny_model import write_tiny_llama

PROCESSORS = {
    "amx": {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    "avx512 with bfloat16": {"avx2", "avx512f", "avx512_vnni", "avx512_bf16"},
    "avx512 without": {"avx2", "avx512f", "avx512_vnni"},
    "avx2": {"avx2"},
}
W8A8 = {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8, "type": "int"}}
W4A16 = {"weights": {"num_bits": 4, "type": "int"}, "input_activations": None}


@pytest.fixture(autouse=True)
def on_a_cpu_without_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    for place in (machine, number_types):
        monkeypatch.setattr(place, "vllm_version", lambda: "0.32.0+cpu")


def become(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (machine, number_types):
        monkeypatch.setattr(place, "processor_flags", lambda: frozenset(PROCESSORS[processor]))


def test_a_delta_rule_is_computed_in_bfloat16_wherever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_family(tmp_path / "base", "qwen3_5")
    for processor in PROCESSORS:
        become(processor, monkeypatch)
        assert engine_number_type(base, "auto").dtype == "bfloat16"


def checkpoint(folder: Path, **config: object) -> Path:
    write_tiny_llama(folder)
    given = json.loads((folder / "config.json").read_text())
    given.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**given, **config}))
    return folder


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("own", ["bfloat16", "float32", "float16"])
def test_bfloat16_only_where_the_processor_has_instructions_for_it(
    processor: str, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(processor, monkeypatch)
    weights = checkpoint(tmp_path / "m", dtype=own)
    native = "bf16" in " ".join(PROCESSORS[processor])
    found = engine_number_type(weights, "auto")
    # float16 would lose three bits in bfloat16, and none of these processors multiplies it.
    assert found.dtype == ("bfloat16" if native and own != "float16" else "float32")
    assert found.reason
    assert training_number_type("cpu", "auto").dtype == ("bfloat16" if native else "float32")


def test_what_is_set_stays_and_a_gpu_is_left_to_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become("avx2", monkeypatch)
    weights = checkpoint(tmp_path / "m", dtype="bfloat16")
    assert engine_number_type(weights, "bfloat16").dtype == "bfloat16"
    assert training_number_type("cpu", "bfloat16").dtype == "bfloat16"
    monkeypatch.setattr(number_types, "vllm_version", lambda: "0.32.0")
    assert engine_number_type(weights, "auto").dtype == "auto"


@pytest.mark.parametrize(
    ("quantised", "dtype"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": W8A8}}, "float32"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": W4A16}}, "auto"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": W8A8, "b": W4A16}}, "auto"),
        ({"quant_method": "fp8"}, "auto"),
        ({"quant_method": "awq", "bits": 4}, "auto"),
        ({"quant_method": "gptq", "bits": 4}, "auto"),
    ],
)
def test_quantised_weights_are_widened_only_where_their_kernels_take_float32(
    quantised: dict[str, object], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become("avx512 without", monkeypatch)
    weights = checkpoint(tmp_path / "m", dtype="bfloat16", quantization_config=quantised)
    assert engine_number_type(weights, "auto").dtype == dtype


def test_weights_that_would_not_fit_are_not_widened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become("avx2", monkeypatch)
    weights = checkpoint(tmp_path / "m", dtype="bfloat16")
    held = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    monkeypatch.setattr(number_types, "memory_bytes", lambda: 4 * held)
    assert engine_number_type(weights, "auto").dtype == "float32"
    monkeypatch.setattr(number_types, "memory_bytes", lambda: 4 * held - 1)
    found = engine_number_type(weights, "auto")
    assert found.dtype == "bfloat16"
    assert "float32 would take" in found.reason


def speed(base: str, here: Machine, fastest: str) -> MeasuredSpeed:
    costs = {"bfloat16": 2.0, "float32": 2.0, fastest: 1.0}
    timings = tuple(Timing(dtype=name, threads=1, seconds=cost, cpu_s=cost) for name, cost in costs.items())
    return MeasuredSpeed(
        machine=here, base=base, base_name=base, day="2026-11-30", others=0.0, engine=timings, training=timings
    )


def test_a_measurement_on_this_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become("avx512 with bfloat16", monkeypatch)
    weights = checkpoint(tmp_path / "m", dtype="bfloat16")
    assert engine_number_type(weights, "auto").dtype == "bfloat16"
    note_speed(speed("some base", this_machine().model_copy(update={"vllm": "0.31.0+cpu"}), "float32"))
    assert engine_number_type(weights, "auto").dtype == "bfloat16", "measured with another vLLM"
    note_speed(speed("some base", this_machine(), "float32"))
    assert engine_number_type(weights, "auto").dtype == "float32"
    assert "some base" in engine_number_type(weights, "auto").reason
    assert training_number_type("cpu", "auto").dtype == "float32"
    note_speed(speed(number_types.base_fingerprint(weights), this_machine(), "bfloat16"))
    note_speed(speed("a third", this_machine(), "float32"))
    assert engine_number_type(weights, "auto").dtype == "bfloat16", "its own measurement comes before a newer one"


def test_a_damaged_file_of_measurements_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become("avx2", monkeypatch)
    file = note_speed(speed("some base", this_machine(), "bfloat16"))
    assert training_number_type("cpu", "auto").dtype == "bfloat16"
    for text in ("", "[", "{}", "[1]", '[{"machine": 3}]'):
        file.write_text(text)
        assert training_number_type("cpu", "auto").dtype == "float32"


@pytest.mark.parametrize(
    ("isa", "left_out", "kept"),
    [
        ("AVX2", {"avx512f", "avx512_bf16", "amx_bf16"}, {"avx2"}),
        ("avx512_core_vnni", {"avx512_bf16", "amx_bf16", "amx_int8"}, {"avx512f", "avx512_vnni"}),
        ("AVX512_CORE_BF16", {"amx_bf16"}, {"avx512_bf16"}),
        ("DEFAULT", set(), {"amx_bf16"}),
    ],
)
def test_instructions_that_onednn_must_not_use_do_not_count(
    isa: str, left_out: set[str], kept: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"flags": " ".join(PROCESSORS["amx"]), "model name": "One"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert not processor_flags() & left_out
    assert kept <= processor_flags()


def test_what_differs_between_machines_is_said() -> None:
    one = Machine(processor="One", capabilities=("avx2",), cores=2, vllm="0.32.0+cpu", dtype="float32")
    assert one.differences(one) == []
    other = one.model_copy(update={"cores": 4, "capabilities": ()})
    assert one.differences(other) == ["capabilities avx2, not unknown", "cores 2, not 4"]
    assert one.key != other.key
    assert (Machine().key, Machine().is_known, str(Machine())) == ("", False, "an unknown machine")
