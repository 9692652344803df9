"""FIER's arithmetic against slow oracles, and the properties the method promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.specializers.methods.fier.key_retrieval import (
    decode_keys,
    encode_keys,
    pack_bits,
    page_bounds,
    page_scores,
    retrieval_attention,
    score_keys,
    shared_query,
    top_tokens,
    unpack_bits,
    window_tokens,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Head by head, keys and values repeated for every query head."""
    repeat = q.shape[0] // k.shape[1]
    out = []
    for head in range(q.shape[0]):
        logits = torch.stack([q[head] @ k[t, head // repeat] * scale for t in range(len(k))])
        out.append(sum(w * v[t, head // repeat] for t, w in enumerate(logits.softmax(0))))
    return torch.stack(out)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [5, 32, 70, 96])
def test_a_budget_as_long_as_the_context_is_exact_attention(tokens: int) -> None:
    q, k, v = randn(6, 64), randn(tokens, 2, 64, seed=1), randn(tokens, 2, 64, seed=2)
    got = retrieval_attention(q, k, v, scale=0.125, budget=tokens, group=32)
    torch.testing.assert_close(got, exact_attention(q, k, v, 0.125), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10_000), budget=st.integers(1, 95))
@settings(max_examples=30, deadline=None)
def test_keys_of_two_values_are_kept_exactly_and_so_is_the_choice(seed: int, budget: int) -> None:
    low = randn(3, 1, 40, seed=seed).double()
    step = randn(3, 1, 40, seed=seed + 1).double().abs()
    bits = randn(3, 32, 40, seed=seed + 2) > 0
    keys = torch.where(bits, low + step, low).flatten(0, 1)
    codes = encode_keys(keys, 32)
    assert torch.equal(decode_keys(codes), keys)
    q = randn(40, seed=seed + 3).double()
    exact = top_tokens(keys @ q, budget)
    assert torch.equal(top_tokens(score_keys(q, codes), budget), exact)


@given(seed=st.integers(0, 10_000), group=st.sampled_from([32, 64, 128]), d=st.sampled_from([1, 33, 64]))
@settings(max_examples=30, deadline=None)
def test_codes_scores_and_words_are_what_their_definitions_say(seed: int, group: int, d: int) -> None:
    keys, q = randn(2, 2 * group, d, seed=seed, dtype=torch.float64), randn(2, d, seed=seed + 1, dtype=torch.float64)
    codes = encode_keys(keys, group)
    decoded = decode_keys(codes)
    span = (codes.high - codes.low).repeat_interleave(group, 1)
    assert ((keys - decoded).abs() <= span / 2 + 1e-12).all()
    # {0, 1} with offset low and {-1, 1} with offset middle stand for the same keys.
    middle, half = (codes.high + codes.low) / 2, (codes.high - codes.low) / 2
    signed = torch.where(codes.bits, 1.0, -1.0) * half.unsqueeze(-2) + middle.unsqueeze(-2)
    torch.testing.assert_close(signed.flatten(-3, -2), decoded, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(score_keys(q, codes), (decoded @ q[..., None])[..., 0], rtol=1e-10, atol=1e-10)
    assert torch.equal(unpack_bits(pack_bits(codes.bits), d), codes.bits)


def test_a_group_of_equal_keys_is_safe() -> None:
    keys = torch.full((32, 8), 1.5)
    codes = encode_keys(keys, 32)
    assert torch.equal(decode_keys(codes), keys)
    assert torch.isfinite(score_keys(torch.ones(8), codes)).all()


@given(seed=st.integers(0, 10_000), budget=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_a_margin_above_twice_the_error_cannot_change_the_choice(seed: int, budget: int) -> None:
    keys, q = randn(64, 16, seed=seed, dtype=torch.float64), randn(16, seed=seed + 1, dtype=torch.float64)
    codes = encode_keys(keys, 32)
    chosen = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:budget]
    # Lift the chosen along q, in the true scores and in the coded ones alike, until the margin is twice the error.
    true, coded = keys @ q, score_keys(q, codes)
    error = (true - coded).abs().max()
    lift = torch.zeros(64, dtype=torch.float64)
    lift[chosen] = true.max() - true.min() + 2 * error + 1e-9
    assert torch.equal(top_tokens(true + lift, budget), top_tokens(coded + lift, budget))
    assert torch.equal(top_tokens(coded + lift, budget), chosen.sort().values)


def test_one_needle_among_ten_thousand_keys_is_the_first_choice() -> None:
    q, keys = randn(64, seed=3), randn(10_016, 64, seed=4)
    keys[7_777] = q * 2
    assert top_tokens(score_keys(q, encode_keys(keys, 32)), 1).tolist() == [7_777]


def test_keys_that_come_one_by_one_get_the_codes_of_all_at_once() -> None:
    keys = randn(150, 2, 64)
    whole = encode_keys(keys[:128].transpose(0, 1), 32)
    for closed in range(32, 150, 32):
        part = encode_keys(keys[:closed].transpose(0, 1), 32)
        for grown, full in zip(part, whole, strict=True):
            assert torch.equal(grown, full[:, : closed // 32])


def test_the_tail_and_the_sinks_are_always_attended() -> None:
    q, k = randn(4, 64), randn(150, 2, 64, seed=1)
    v = torch.zeros(150, 2, 64)
    v[128:] = 1.0
    got = retrieval_attention(q, k, v, scale=0.0, budget=32, group=32)
    assert torch.allclose(got, torch.full_like(got, 22 / 54))
    assert top_tokens(torch.tensor([-9.0, -9.0, 5.0, 4.0, 3.0]), 3, sinks=2).tolist() == [0, 1, 2]


def test_query_heads_that_share_keys_choose_by_their_summed_scores() -> None:
    q, k = randn(6, 64), randn(64, 2, 64, seed=1)
    codes = encode_keys(k.transpose(0, 1), 32)
    repeated = encode_keys(k.repeat_interleave(3, 1).transpose(0, 1), 32)
    per_head = score_keys(q, repeated).view(2, 3, 64).sum(1)
    torch.testing.assert_close(score_keys(shared_query(q, 2), codes), per_head, rtol=1e-4, atol=1e-4)


def test_finer_groups_recall_more_and_pages_less_on_keys_with_channel_outliers() -> None:
    n, d, budget = 2048, 64, 64
    channel = 1 + 6 * (torch.arange(d) % 16 == 0)
    drift = torch.cumsum(randn(n, d, seed=1), 0) / 8  # keys of neighbouring tokens resemble each other
    keys = (drift + randn(n, d, seed=2)) * channel
    recalls = {32: 0.0, 128: 0.0, 256: 0.0, 0: 0.0}
    for seed in range(8):
        q = randn(d, seed=10 + seed)
        wanted = set(top_tokens(keys @ q, budget).tolist())
        for group in (32, 128, 256):
            recalls[group] += len(wanted & set(top_tokens(score_keys(q, encode_keys(keys, group)), budget).tolist()))
        pages = top_tokens(page_scores(q, *page_bounds(keys, 16)), budget // 16)
        recalls[0] += len(wanted & {t for p in pages.tolist() for t in range(16 * p, 16 * p + 16)})
    assert recalls[32] > recalls[128] > recalls[256] > recalls[0]


def test_quests_bound_is_above_every_score_of_its_page_and_the_window_keeps_both_ends() -> None:
    keys, q = randn(64, 16), randn(16, seed=1)
    bounds = page_scores(q, *page_bounds(keys, 16))
    assert (bounds + 1e-5 >= (keys @ q).view(4, 16).amax(-1)).all()
    # The sum over channels, channel by channel.
    first = sum(max(float(q[c] * x) for x in keys[:16, c]) for c in range(16))
    assert math.isclose(float(bounds[0]), first, rel_tol=1e-4)
    assert window_tokens(20, 6).tolist() == [0, 1, 2, 3, 18, 19]
    assert window_tokens(5, 6).tolist() == [0, 1, 2, 3, 4]


def test_keys_that_fill_no_whole_group_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of groups"):
        encode_keys(randn(33, 4), 32)
