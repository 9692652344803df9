"""Every wrong T-REX adapter is named before an engine sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from metier.agents import PROMPT_LAYOUT, AdapterError
from metier.runtime.settings.engine import SlotRank
from metier.specializers import AskSpec, EngineSpec, Variant, base_fingerprint, check_adapter, check_variant
from metier.specializers.adapters.adapter_check import SLOT_RANKS
from tests.tiny_model import LINEAR_TARGETS, write_tiny_llama
from tests.tiny_trex import write_random_trex

WEIGHTS = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj."
ROUTER = LAYER + "lora_router.weight"


@pytest.fixture
def adapter(tmp_path: Path, tiny_base: Path) -> Path:
    return write_random_trex(tmp_path / "adapter", tiny_base, r1=2, r2=4)


def change_block(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["trex"] = {**config["trex"], **changes}
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_good_adapter_is_described(tmp_path: Path, tiny_base: Path, dtype: str) -> None:
    folder = write_random_trex(tmp_path / "adapter", tiny_base, r1=4, r2=2, dtype=dtype)
    facts = check_adapter(folder, tiny_base, slot_rank=16)
    assert (facts.kind, facts.rank, facts.scaling) == ("trex", 4 + 4 * 2, 1.0)
    assert len(facts.modules) == 2 * len(LINEAR_TARGETS)
    assert facts.dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    # A layer of d_in to d_out has r1·d_in + r2·d_out + r1·r2·d_in + 2 parameters; the map is not trained.
    shapes = [(64, 128), (64, 64), (64, 64), (128, 64), (64, 128), (64, 128), (128, 64)]
    assert facts.parameters == 2 * sum(4 * d_in + 2 * d_out + 8 * d_in + 2 for d_in, d_out in shapes)


def test_slot_ranks_are_those_of_the_engine() -> None:
    assert get_args(SlotRank) == SLOT_RANKS


@pytest.mark.parametrize(
    ("r1", "r2", "slot_rank", "rows", "enough"),
    [(2, 4, 8, 10, 16), (4, 8, 32, 36, 64)],
)
def test_a_slot_too_small_for_the_router_is_refused(
    tmp_path: Path, tiny_base: Path, r1: int, r2: int, slot_rank: int, rows: int, enough: int
) -> None:
    folder = write_random_trex(tmp_path / "adapter", tiny_base, r1=r1, r2=r2, targets=["q_proj"])
    said = rf"{rows} rows of a slot \(r1 \+ r1·r2\).*slot_rank={slot_rank}.*Start .* slot_rank={enough}"
    with pytest.raises(AdapterError, match=said):
        check_adapter(folder, tiny_base, slot_rank=slot_rank)
    check_adapter(folder, tiny_base, slot_rank=enough)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": 2}, "trex.format is 2"),
        ({"r1": 0}, "trex.r1 is 0"),
        ({"r2": True}, "trex.r2 is True"),
        ({"k_tok": "32"}, "trex.k_tok is '32'"),
        ({"k_task": float("nan")}, "trex.k_task is nan"),
        ({"k_task": None}, "trex.k_task is None"),
        ({"k_tok": 1e30}, r"trex.k_tok is 1e\+30; expected a number from 0 to 1000"),
        ({"k_task": 1001}, "trex.k_task is 1001"),
        ({"r1": 10**15}, "trex.r1 is 1000000000000000; expected a whole number from 1 to 512"),
        ({"prompt_rule": "task-input/0"}, "trex.prompt_rule is 'task-input/0'; expected 'task-input/1'"),
        ({"embed_id": "nomic-embed-text-v1"}, "no embedding 'nomic-embed-text-v1' here"),
        ({"embed_id": ""}, "trex.embed_id is ''"),
        ({"r1": 4, "r2": 2}, r"lora_A.weight is \[2, (\d+)\]; expected \[4, \1\]"),
        ({"r2": 8}, r"lora_B.weight is \[\d+, 4\]; expected \[\d+, 8\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    adapter: Path, tiny_base: Path, changes: dict[str, Any], named: str
) -> None:
    change_block(adapter, **changes)
    with pytest.raises(AdapterError, match=named):
        check_adapter(adapter, tiny_base, slot_rank=64)


def test_a_missing_block_is_named(adapter: Path, tiny_base: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["trex"]
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="trex is None"):
        check_adapter(adapter, tiny_base, slot_rank=64)


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_router.weight", "trex_omega", "trex_gamma"])
def test_missing_and_misshaped_parts_are_named(adapter: Path, tiny_base: Path, part: str) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    change_tensors(adapter, lambda tensors: tensors.update({LAYER + part: tensors[LAYER + part][:0].clone()}))
    with pytest.raises(AdapterError, match=rf"layers\.0\.self_attn\.q_proj\.{part} is \[0"):
        check_adapter(adapter, tiny_base, slot_rank=16)
    (adapter / WEIGHTS).write_bytes(whole)
    change_tensors(adapter, lambda tensors: tensors.pop(LAYER + part))
    with pytest.raises(AdapterError, match=rf"layers\.0\.self_attn\.q_proj has no {part}"):
        check_adapter(adapter, tiny_base, slot_rank=16)


def test_a_transposed_router_is_named(tmp_path: Path, tiny_base: Path) -> None:
    folder = write_random_trex(tmp_path / "adapter", tiny_base)
    change_tensors(folder, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].T.contiguous()}))
    with pytest.raises(AdapterError, match=r"lora_router.weight is \[64, 8\]; expected \[8, 64\], that is \[r1·r2"):
        check_adapter(folder, tiny_base, slot_rank=16)


@pytest.mark.parametrize("name", ["trex_centroids", "trex_center"])
def test_a_map_that_is_missing_or_of_another_embedding_is_refused(adapter: Path, tiny_base: Path, name: str) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    change_tensors(adapter, lambda tensors: tensors.update({name: tensors[name][..., :128].contiguous()}))
    with pytest.raises(AdapterError, match=rf"{name} is \[.*128\].*256 numbers of 'hashed-ngrams-256/1'.*another"):
        check_adapter(adapter, tiny_base, slot_rank=16)
    (adapter / WEIGHTS).write_bytes(whole)
    change_tensors(adapter, lambda tensors: tensors.pop(name))
    with pytest.raises(AdapterError, match=f"has no {name}"):
        check_adapter(adapter, tiny_base, slot_rank=16)


def test_centroids_that_are_no_directions_are_refused(adapter: Path, tiny_base: Path) -> None:
    change_tensors(adapter, lambda tensors: tensors["trex_centroids"][3].mul_(2.0))
    with pytest.raises(AdapterError, match="row 3 of trex_centroids has length 2"):
        check_adapter(adapter, tiny_base, slot_rank=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [ROUTER, LAYER + "trex_gamma", "trex_centroids", "trex_center"])
def test_one_number_that_is_not_finite_is_found(adapter: Path, tiny_base: Path, name: str, value: float) -> None:
    change_tensors(adapter, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(AdapterError, match=f"{name} holds values that are not finite"):
        check_adapter(adapter, tiny_base, slot_rank=16)


def test_unknown_keys_and_types_are_refused(adapter: Path, tiny_base: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    change_tensors(adapter, lambda tensors: tensors.update({"surprise": tensors["trex_center"].clone()}))
    with pytest.raises(AdapterError, match="unknown key 'surprise'"):
        check_adapter(adapter, tiny_base, slot_rank=16)
    (adapter / WEIGHTS).write_bytes(whole)
    change_tensors(adapter, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].double()}))
    with pytest.raises(AdapterError, match="lora_router.weight is F64; expected one of BF16, F16, F32"):
        check_adapter(adapter, tiny_base, slot_rank=16)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    wide = write_tiny_llama(tmp_path / "wide", hidden=96)
    folder = write_random_trex(tmp_path / "adapter", wide)
    with pytest.raises(AdapterError, match=r"is \[.*96.*\]; expected \[.*64.*\], that is .* on base tiny"):
        check_adapter(folder, tiny_base, slot_rank=16)
    deep = write_random_trex(tmp_path / "deep-adapter", write_tiny_llama(tmp_path / "deep", layers=3))
    with pytest.raises(AdapterError, match=r"layers\.2.*no linear layer of base"):
        check_adapter(deep, tiny_base, slot_rank=16)


def test_a_variant_is_checked_against_the_kind_and_rows_of_its_adapter(
    tmp_path: Path, adapter: Path, tiny_base: Path
) -> None:
    base = base_fingerprint(tiny_base)

    def check(ask: AskSpec) -> None:
        variant = Variant(
            id="0" * 16, name="all", base=base, prompt_layout=PROMPT_LAYOUT, engine=EngineSpec(base=base), ask=ask
        )
        facts = check_variant(variant, tmp_path, tiny_base, slot_rank=16)
        assert facts is not None and (facts.kind, facts.rank) == ("trex", 10)

    check(AskSpec(adapter="trex", rank=10))
    with pytest.raises(AdapterError, match="recorded as lora with rank 10; expected trex with rank 10"):
        check(AskSpec(adapter="lora", rank=10))
    with pytest.raises(AdapterError, match="recorded as trex with rank 2"):
        check(AskSpec(adapter="trex", rank=2))


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_router.weight"])
def test_values_that_overflow_behind_the_gate_are_refused(adapter: Path, tiny_base: Path, part: str) -> None:
    change_block(adapter, k_tok=1000)
    change_tensors(adapter, lambda tensors: tensors[LAYER + part].mul_(60_000))
    with pytest.raises(AdapterError, match=r"q_proj may add .* \(gate up to .*its router holds"):
        check_adapter(adapter, tiny_base, slot_rank=16)
