"""Every wrong adapter is named before an engine sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metier.agents import PROMPT_LAYOUT, AdapterError
from metier.specializers import AskSpec, EngineSpec, Variant, base_fingerprint, check_adapter, check_variant
from tests.tiny_model import LINEAR_TARGETS, write_random_lora, write_tiny_llama

WEIGHTS = "adapter_model.safetensors"
SOME_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path: Path, tiny_base: Path) -> Path:
    return write_random_lora(tmp_path / "adapter", tiny_base, rank=4)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_good_adapter_is_described(tmp_path: Path, tiny_base: Path, dtype: str) -> None:
    folder = write_random_lora(tmp_path / "adapter", tiny_base, rank=4, scale=3.0, dtype=dtype)
    facts = check_adapter(folder, tiny_base, slot_rank=8)
    assert (facts.rank, facts.alpha, facts.scaling) == (4, 12.0, 3.0)
    assert len(facts.modules) == 2 * len(LINEAR_TARGETS)
    assert facts.size_bytes == (folder / WEIGHTS).stat().st_size
    assert facts.dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]


def test_rank_stabilised_scaling_is_known(adapter: Path, tiny_base: Path) -> None:
    change_config(adapter, use_rslora=True, lora_alpha=6)
    assert check_adapter(adapter, tiny_base, slot_rank=4).scaling == 3.0


def test_ranks_by_layer_follow_their_pattern(tmp_path: Path, tiny_base: Path) -> None:
    folder = write_random_lora(tmp_path / "low", tiny_base, rank=2, targets=["q_proj"])
    high = write_random_lora(tmp_path / "high", tiny_base, rank=6, targets=["up_proj"])
    from safetensors.torch import load_file

    change_tensors(folder, lambda tensors: tensors.update(load_file(high / WEIGHTS)))
    with pytest.raises(AdapterError, match="expected the declared rank 2"):
        check_adapter(folder, tiny_base, slot_rank=8)
    change_config(folder, rank_pattern={"up_proj": 6}, target_modules=["q_proj", "up_proj"])
    assert check_adapter(folder, tiny_base, slot_rank=8).rank == 6
    with pytest.raises(AdapterError, match=r"6 rows of a slot \(rank\).*slot_rank=4"):
        check_adapter(folder, tiny_base, slot_rank=4)


@pytest.mark.parametrize("missing", [WEIGHTS, "adapter_config.json"])
def test_a_missing_file_is_named(adapter: Path, tiny_base: Path, missing: str) -> None:
    (adapter / missing).unlink()
    with pytest.raises(AdapterError, match=f"lacks {missing}"):
        check_adapter(adapter, tiny_base, slot_rank=8)


def test_a_pickle_is_refused(adapter: Path, tiny_base: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="not a pickle"):
        check_adapter(adapter, tiny_base, slot_rank=8)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_file_is_damaged(adapter: Path, tiny_base: Path, keep: int) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:keep])
    with pytest.raises(AdapterError, match="is damaged"):
        check_adapter(adapter, tiny_base, slot_rank=8)


def test_overwritten_bytes_of_the_header_are_damage(adapter: Path, tiny_base: Path) -> None:
    whole = bytearray((adapter / WEIGHTS).read_bytes())
    whole[8:40] = b"\xff" * 32
    (adapter / WEIGHTS).write_bytes(whole)
    with pytest.raises(AdapterError, match="is damaged"):
        check_adapter(adapter, tiny_base, slot_rank=8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_number_that_is_not_finite_is_found(tmp_path: Path, tiny_base: Path, dtype: str, value: float) -> None:
    folder = write_random_lora(tmp_path / "adapter", tiny_base, rank=4, dtype=dtype)
    change_tensors(folder, lambda tensors: tensors[SOME_A].view(-1)[17:18].fill_(value))
    with pytest.raises(AdapterError, match=r"q_proj.*not finite"):
        check_adapter(folder, tiny_base, slot_rank=8)


@pytest.mark.parametrize(
    ("value", "named"), [(-3e38, "magnitude 3e"), (70_000.0, "magnitude 7"), (65_000.0, "q_proj may add")]
)
def test_finite_numbers_that_no_engine_can_serve_are_refused(
    tmp_path: Path, tiny_base: Path, value: float, named: str
) -> None:
    folder = write_random_lora(tmp_path / "adapter", tiny_base, rank=4, dtype="bfloat16")
    change_tensors(folder, lambda tensors: tensors[SOME_A].view(-1)[17:18].fill_(value))
    with pytest.raises(AdapterError, match=named):
        check_adapter(folder, tiny_base, slot_rank=8)


def test_large_numbers_that_an_engine_can_serve_pass(tmp_path: Path, tiny_base: Path) -> None:
    folder = write_random_lora(tmp_path / "adapter", tiny_base, rank=4, dtype="bfloat16")
    change_tensors(folder, lambda tensors: tensors[SOME_A].view(-1)[17:18].fill_(500.0))
    check_adapter(folder, tiny_base, slot_rank=8)


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn", "float8_e5m2"])
def test_a_value_that_is_not_finite_is_found_in_other_float_types(adapter: Path, tiny_base: Path, dtype: str) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        tensors[SOME_A] = tensors[SOME_A].to(torch.float64).to(getattr(torch, dtype))

    change_tensors(adapter, change)
    check_adapter(adapter, tiny_base, slot_rank=8)

    def poison(tensors: dict[str, Any]) -> None:
        values = tensors[SOME_A].to(torch.float64)
        values[0, 3] = float("nan")
        tensors[SOME_A] = values.to(getattr(torch, dtype))

    change_tensors(adapter, poison)
    with pytest.raises(AdapterError, match=r"q_proj.*not finite"):
        check_adapter(adapter, tiny_base, slot_rank=8)


@pytest.mark.parametrize("dtype", ["int8", "bool", "int64"])
def test_numbers_that_are_no_floats_are_refused(adapter: Path, tiny_base: Path, dtype: str) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        tensors[SOME_A] = torch.ones(tensors[SOME_A].shape, dtype=getattr(torch, dtype))

    change_tensors(adapter, change)
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight.* is (I8|BOOL|I64)"):
        check_adapter(adapter, tiny_base, slot_rank=8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_modules": ["q_proj"]}, "which is not among target_modules"),
        ({"target_modules": [*LINEAR_TARGETS, "lm_head", "layers.0"]}, None),
        ({"target_modules": "(.*)+x"}, "may take for ever"),
        ({"target_modules": ".*.*.*.*.*x"}, "may take for ever"),
        ({"target_modules": "("}, "has the pattern"),
        ({"target_modules": r".*\.(q|k|v|o|up|down|gate)_proj"}, None),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": "all-linear"}, None),
        ({"rank_pattern": {"(a+)+": 4}}, "may take for ever"),
        ({"rank_pattern": [4]}, "rank_pattern is"),
        ({"rank_pattern": {"q_proj": 2**40}}, "rank_pattern is"),
        ({"alpha_pattern": {"(a+)+": 4}}, "may take for ever"),
        ({"alpha_pattern": {"q_proj": 1e30}}, "alpha_pattern is"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"lora_alpha": 60_000}, "may add"),
        ({"lora_alpha": 1e30}, r"lora_alpha is 1e\+30"),
        ({"lora_alpha": 10**30}, "is too large"),
    ],
)
def test_layers_and_scales_unlike_the_file_are_refused(
    adapter: Path, tiny_base: Path, changes: dict[str, Any], named: str | None
) -> None:
    change_config(adapter, **changes)
    if named is None:
        check_adapter(adapter, tiny_base, slot_rank=8)
        return
    with pytest.raises(AdapterError, match=named):
        check_adapter(adapter, tiny_base, slot_rank=8)


def test_a_layer_that_the_weights_lack_is_named(adapter: Path, tiny_base: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for half in "AB":
            del tensors[SOME_A.replace("lora_A", f"lora_{half}")]

    change_tensors(adapter, change)
    with pytest.raises(AdapterError, match=r"names model\.layers\.0\.self_attn\.q_proj, which the weights lack"):
        check_adapter(adapter, tiny_base, slot_rank=8)


def test_a_declared_rank_that_is_not_real_is_refused(adapter: Path, tiny_base: Path) -> None:
    change_config(adapter, r=8)
    with pytest.raises(AdapterError, match=r"rank 4 in lora_A.*expected the declared rank 8"):
        check_adapter(adapter, tiny_base, slot_rank=8)


def test_a_rank_above_the_slots_is_refused(adapter: Path, tiny_base: Path) -> None:
    with pytest.raises(AdapterError, match=r"4 rows of a slot \(rank\).*slot_rank=2"):
        check_adapter(adapter, tiny_base, slot_rank=2)


def test_shapes_of_another_base_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    wide = write_tiny_llama(tmp_path / "wide", hidden=96)
    folder = write_random_lora(tmp_path / "adapter", wide, rank=4)
    with pytest.raises(AdapterError, match=r"lora_B \[96, 4\].*expected .* \[64, rank\]"):
        check_adapter(folder, tiny_base, slot_rank=8)


def test_layers_that_the_base_lacks_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    deep = write_tiny_llama(tmp_path / "deep", layers=3)
    folder = write_random_lora(tmp_path / "adapter", deep, rank=4)
    with pytest.raises(AdapterError, match=r"layers\.2.*no linear layer of base"):
        check_adapter(folder, tiny_base, slot_rank=8)


def test_unknown_keys_and_lone_halves_are_refused(adapter: Path, tiny_base: Path) -> None:
    change_tensors(adapter, lambda tensors: tensors.pop(SOME_A))
    with pytest.raises(AdapterError, match="q_proj has no lora_A"):
        check_adapter(adapter, tiny_base, slot_rank=8)
    change_tensors(adapter, lambda tensors: tensors.update({"surprise": next(iter(tensors.values())).clone()}))
    with pytest.raises(AdapterError, match="unknown key 'surprise'"):
        check_adapter(adapter, tiny_base, slot_rank=8)
    change_tensors(adapter, lambda tensors: tensors.clear())
    with pytest.raises(AdapterError, match="holds no tensors"):
        check_adapter(adapter, tiny_base, slot_rank=8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "without DoRA"),
        ({"modules_to_save": ["lm_head"]}, "without whole trained modules"),
        ({"alora_invocation_tokens": [1]}, "without activated LoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "without biases"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base's own weights"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ],
)
def test_settings_that_mean_another_adapter_are_refused(
    adapter: Path, tiny_base: Path, changes: dict[str, Any], named: str
) -> None:
    change_config(adapter, **changes)
    with pytest.raises(AdapterError, match=named):
        check_adapter(adapter, tiny_base, slot_rank=8)


def test_a_config_that_is_no_json_is_refused(adapter: Path, tiny_base: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is not JSON"):
        check_adapter(adapter, tiny_base, slot_rank=8)


def variant_of(base: str, **changes: Any) -> Variant:
    fields: dict[str, Any] = {
        "id": "0" * 16,
        "name": "solver",
        "base": base,
        "prompt_layout": PROMPT_LAYOUT,
        "engine": EngineSpec(base=base),
        "ask": AskSpec(adapter="lora", rank=4),
    }
    return Variant(**{**fields, **changes})


def test_a_variant_is_checked_against_base_layout_and_rank(tmp_path: Path, adapter: Path, tiny_base: Path) -> None:
    base = base_fingerprint(tiny_base)
    facts = check_variant(variant_of(base), tmp_path, tiny_base, slot_rank=8)
    assert facts is not None and facts.rank == 4
    assert check_variant(variant_of(base, ask=AskSpec()), tmp_path, tiny_base, slot_rank=8) is None
    for variant, named in (
        (variant_of("f" * 16), "was made for base ffffffffffffffff"),
        (variant_of(base, prompt_layout=99), "prompt layout 99"),
        (variant_of(base, ask=AskSpec(adapter="lora", rank=2)), "recorded as lora with rank 2"),
    ):
        with pytest.raises(AdapterError, match=named):
            check_variant(variant, tmp_path, tiny_base, slot_rank=8)


def test_a_base_of_the_same_shape_is_still_another_base(tmp_path: Path, adapter: Path, tiny_base: Path) -> None:
    twin = write_tiny_llama(tmp_path / "twin", seed=1)
    check_adapter(adapter, twin, slot_rank=8)  # shapes cannot tell them apart
    with pytest.raises(AdapterError, match="was made for base"):
        check_variant(variant_of(base_fingerprint(tiny_base)), tmp_path, twin, slot_rank=8)
    copy = shutil.copytree(tiny_base, tmp_path / "copy")
    check_variant(variant_of(base_fingerprint(tiny_base)), tmp_path, copy, slot_rank=8)
