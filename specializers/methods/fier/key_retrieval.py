"""FIER's arithmetic: 1-bit keys that score every token of a context, and exact attention on the best of them.

Shapes: H query heads, h key-value heads, d channels, n tokens, g tokens of a group, w = ceil(d / 32) words of bits.
Source: "FIER: Fine-Grained and Efficient KV Cache Retrieval", arXiv 2508.08256, section 3. The paper leaves open how
scale and offset are found (here: the least and greatest key of group and channel), what becomes of keys newer than the
last whole group (always attended), and how query heads that share keys choose (their scores are summed).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "WORD_BITS",
    "KeyCodes",
    "attend",
    "decode_keys",
    "encode_keys",
    "pack_bits",
    "page_bounds",
    "page_scores",
    "retrieval_attention",
    "score_keys",
    "shared_query",
    "top_tokens",
    "unpack_bits",
    "window_tokens",
]

WORD_BITS = 32  # channels of one word of codes


class KeyCodes(NamedTuple):
    """1-bit keys of whole groups: `bits` [..., n/g, g, d] of bool, `low` and `high` [..., n/g, d] in the keys' type."""

    bits: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def encode_keys(keys: torch.Tensor, group: int) -> KeyCodes:
    """Quantise keys [..., n, d] to one bit per channel, g consecutive tokens sharing two levels (paper, eq. 4).

    n must be a multiple of `group`. A key is coded as the greatest value of its group and channel when it lies above
    the middle between greatest and least, which puts it at most (high - low) / 2 from what it stands for.
    """
    *outer, n, d = keys.shape
    if n % group:
        raise ValueError(f"{n} keys are no whole number of groups of {group}")
    grouped = keys.reshape(*outer, n // group, group, d)
    low, high = grouped.amin(-2), grouped.amax(-2)
    middle = (low.float() + high.float()) * 0.5
    return KeyCodes(grouped.float() > middle.unsqueeze(-2), low, high)


def decode_keys(codes: KeyCodes) -> torch.Tensor:
    """The keys [..., n, d] that codes stand for."""
    keys = torch.where(codes.bits, codes.high.unsqueeze(-2), codes.low.unsqueeze(-2))
    return keys.flatten(-3, -2)


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bits [..., g, d] as words [..., w, g] of int32: a token's channel c is bit c % 32 of its word c // 32."""
    places = torch.arange(WORD_BITS, device=bits.device)
    padded = torch.nn.functional.pad(bits.long(), (0, -bits.shape[-1] % WORD_BITS))
    words = (padded.unflatten(-1, (-1, WORD_BITS)) << places).sum(-1).transpose(-1, -2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_bits(words: torch.Tensor, channels: int) -> torch.Tensor:
    """The inverse of `pack_bits`: words [..., w, g] to bits [..., g, d], d being `channels`."""
    places = torch.arange(WORD_BITS, device=words.device)
    bits = (words.long().transpose(-1, -2).unsqueeze(-1) >> places) & 1
    return bits.flatten(-2)[..., :channels].bool()


def score_keys(query: torch.Tensor, codes: KeyCodes) -> torch.Tensor:
    """q · decoded key for every token, [..., n], from a query [..., d], without decoding any (spec: exact identity).

    A group costs one product q · low and, per token, a sum over its set bits of q (high - low).
    """
    wide = query.dtype if query.dtype == torch.float64 else torch.float32
    q, low, high = query.to(wide), codes.low.to(wide), codes.high.to(wide)
    steps = q.unsqueeze(-2) * (high - low)
    offset = (q.unsqueeze(-2) * low).sum(-1, keepdim=True)
    return ((codes.bits.to(wide) * steps.unsqueeze(-2)).sum(-1) + offset).flatten(-2)


def shared_query(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """One query [h, d] for each key-value head from [H, d]: the sum over the heads that share its keys.

    Scores are linear in the query, so this selects by the summed scores of those heads.
    """
    heads, d = query.shape
    wide = query.dtype if query.dtype == torch.float64 else torch.float32
    return query.to(wide).view(kv_heads, heads // kv_heads, d).sum(1)


def top_tokens(scores: torch.Tensor, budget: int, sinks: int = 0) -> torch.Tensor:
    """Positions [..., min(budget, n)], ascending, of the best scores; the first `sinks` tokens come before any other.

    Of equal scores the earlier token is taken.
    """
    n = scores.shape[-1]
    if budget >= n:
        return torch.arange(n).expand(*scores.shape[:-1], n)
    raised = scores.clone()
    raised[..., :sinks] = torch.inf
    order = torch.sort(raised, dim=-1, descending=True, stable=True).indices
    return order[..., :budget].sort(-1).values


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact attention [H/h, d] of the query heads [H/h, d] of one key-value head on keys and values [n, d]."""
    weights = ((query.float() @ keys.float().T) * scale).softmax(-1)
    return weights @ values.float()


def retrieval_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    budget: int,
    group: int,
    sinks: int = 0,
    codes: KeyCodes | None = None,
) -> torch.Tensor:
    """One decode step of one sequence: attention [H, d] on the `budget` best tokens of whole groups and on the tail.

    `query` is [H, d], `keys` and `values` are [n, h, d]; the last n % group tokens are always attended. `codes` are
    those of the whole groups, [h, n // group, ...]; they are made from the keys where not given.
    """
    kv_heads, closed = keys.shape[1], len(keys) // group * group
    if closed <= budget:
        chosen = torch.arange(len(keys)).expand(kv_heads, -1)
    else:
        known = encode_keys(keys[:closed].transpose(0, 1), group) if codes is None else codes
        best = top_tokens(score_keys(shared_query(query, kv_heads), known), budget, sinks)
        tail = torch.arange(closed, len(keys)).expand(kv_heads, -1)
        chosen = torch.cat([best, tail], dim=-1)
    shared = query.unflatten(0, (kv_heads, -1))
    return torch.cat([attend(shared[i], keys[at, i], values[at, i], scale) for i, at in enumerate(chosen)])


# ---- what it is compared with -----------------------------------------------------------------------------------


def page_bounds(keys: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quest's summary of keys [..., n, d]: least and greatest key of each page and channel, [..., n/page, d] each."""
    paged = keys.unflatten(-2, (-1, page))
    return paged.amin(-2), paged.amax(-2)


def page_scores(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Quest's upper bound [..., n/page] of q · k in each page: sum over channels of max(q low, q high).

    Source: "Quest: Query-Aware Sparsity", arXiv 2406.10774, algorithm 1 (FIER's paper has a maximum for the sum).
    """
    q = query.float().unsqueeze(-2)
    return torch.maximum(q * low.float(), q * high.float()).sum(-1)


def window_tokens(n: int, budget: int, sinks: int = 4) -> torch.Tensor:
    """Positions that a recent window keeps of n tokens: the first `sinks` and the last `budget` - `sinks`."""
    if budget >= n:
        return torch.arange(n)
    return torch.cat([torch.arange(sinks), torch.arange(n - budget + sinks, n)])
