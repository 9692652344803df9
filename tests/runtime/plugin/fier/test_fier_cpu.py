"""FIER's compiled step against the arithmetic in torch: codes bit by bit, attention within rounding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metier.agents.errors import PluginError
from metier.runtime.plugin.fier import fier_cpu
from metier.runtime.plugin.fier.fier_cpu import SideCache, load_operators, unsupported
from metier.specializers.shelf.fier_settings import FierSettings

BLOCK = 128


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    reason = load_operators()
    if reason:
        pytest.skip(reason)


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(settings: FierSettings, dtype: torch.dtype, d: int, *, native: bool, heads: int = 2) -> SideCache:
    """Ten blocks whose slots were written in pieces, some of them twice, as engines do."""
    cache = SideCache.allocate(10, BLOCK, heads, d, dtype, settings)
    keys = randn(10 * BLOCK, heads, d, seed=1, dtype=dtype)
    old = randn(3 * BLOCK, heads, d, seed=9, dtype=dtype)
    cache.store(old, torch.arange(3 * BLOCK), native=native)
    for start in range(0, 10 * BLOCK, 93):
        piece = torch.arange(start, min(start + 93, 10 * BLOCK))
        padded = torch.cat([piece, torch.tensor([-1, -1])])
        cache.store(torch.cat([keys[piece], keys[:2]]), padded, native=native)
    assert torch.equal(cache.rows, keys)
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("d", "group"), [(32, 32), (64, 32), (64, 64), (64, 128), (96, 64), (128, 32), (128, 128), (256, 32)]
)
def test_the_operators_give_the_codes_and_the_attention_of_torch(dtype: torch.dtype, d: int, group: Any) -> None:
    settings = FierSettings(budget_tokens=100, group_tokens=group, min_context_tokens=140)
    native, plain = (filled(settings, dtype, d, native=n) for n in (True, False))
    assert torch.equal(native.pages, plain.pages)
    table = torch.tensor([[7, 2, 9, 0], [1, 3, 4, 5], [6, 8, 0, 0], [2, 2, 2, 2]], dtype=torch.int32)
    lengths = torch.tensor([512, 391, 130, 1], dtype=torch.int32)
    for heads in (2, 6, 18):
        query = randn(4, heads, d, seed=2, dtype=dtype)
        values = randn(10, 2, BLOCK, 2 * d, seed=3, dtype=dtype)[..., :d].contiguous()
        wanted = torch.empty_like(query)
        plain.decode(wanted, query, values, table, lengths, scale=d**-0.5, native=False)
        for wide in (True, False):
            got = torch.empty_like(query)
            native.decode(got, query, values, table, lengths, scale=d**-0.5, native=True, wide=wide)
            # Two scores may be so near that another order of sums swaps them at the edge of the budget.
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            close = torch.isclose(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)
            assert close.float().mean() > 0.99, (heads, wide)


def test_equal_scores_and_scores_that_are_no_numbers_still_give_a_choice_within_the_budget() -> None:
    settings = FierSettings(budget_tokens=40, min_context_tokens=0)
    values = randn(2, 1, BLOCK, 64, seed=3, dtype=torch.float32)
    table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([256], dtype=torch.int32)
    query, out = torch.ones(1, 1, 64), torch.empty(1, 1, 64)
    cache = SideCache.allocate(2, BLOCK, 1, 64, torch.float32, settings)
    cache.store(torch.ones(256, 1, 64), torch.arange(256), native=True)
    cache.decode(out, query, values, table, lengths, scale=0.1, native=True)
    torch.testing.assert_close(out[0, 0], values[0, 0, :40].mean(0))  # the earlier of equals
    for bad in (float("nan"), float("inf"), -float("inf")):
        keys = torch.ones(256, 1, 64)
        keys[70:90] = bad
        cache.store(keys, torch.arange(256), native=True)
        cache.decode(out, query, values, table, lengths, scale=0.1, native=True)


def test_memory_is_what_the_settings_say() -> None:
    for dtype, group in ((torch.bfloat16, 32), (torch.bfloat16, 128), (torch.float32, 64)):
        settings = FierSettings(group_tokens=group, dense_layers=0)  # type: ignore[arg-type]
        cache = SideCache.allocate(4, BLOCK, 3, 64, dtype, settings)
        kv = 4 * BLOCK * 3 * 2 * 64 * dtype.itemsize
        assert cache.bytes == pytest.approx(kv * settings.cache_share(1, dtype.itemsize))
    assert FierSettings(dense_layers=0).cache_share(30, 2) == 0.5625
    assert FierSettings(dense_layers=40).cache_share(30, 2) == 0.0


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"budget_tokens": 0}, {"budget_tokens": -5}, {"group_tokens": 48}, {"budget_tokens": 3}, {"k": 1}):
        with pytest.raises(ValueError):
            FierSettings.model_validate(wrong)


def test_without_a_compiler_the_reason_is_given_and_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object) -> None:
        raise PluginError("no C++ compiler was found on PATH")

    monkeypatch.setattr(fier_cpu, "_reason", None)
    monkeypatch.setattr(fier_cpu, "build_library", refuse)
    monkeypatch.setattr(fier_cpu.torch.ops, "metier", SimpleNamespace())
    assert "no C++ compiler" in load_operators()
    assert not fier_cpu.operators_trusted()
    monkeypatch.setenv("METIER_FIER_KERNEL", "0")
    assert load_operators() == "METIER_FIER_KERNEL=0"


def test_layers_that_must_stay_stock_are_told_by_what_they_have() -> None:
    known: dict[str, Any] = {
        "head_size": 64, "kv_cache_dtype": "auto", "is_fp8_kv_cache": False, "sliding_window": -1, "alibi_slopes": None,
        "logits_soft_cap": 0, "sinks": None, "kv_sharing_target_layer_name": None, "attn_type": "decoder",
        "num_queries_per_kv": 3,
    }  # fmt: skip
    assert unsupported(SimpleNamespace(**known), torch.bfloat16) == ""
    assert "float16" in unsupported(SimpleNamespace(**known), torch.float16)
    for field, value, said in (
        ("head_size", 80, "heads of 80"), ("is_fp8_kv_cache", True, "cache of type"), ("sliding_window", 512, "window"),
        ("logits_soft_cap", 30.0, "capped"), ("attn_type", "encoder", "encoder"),
        ("num_queries_per_kv", 32, "32 query"),
    ):  # fmt: skip
        assert said in unsupported(SimpleNamespace(**{**known, field: value}), torch.bfloat16)
