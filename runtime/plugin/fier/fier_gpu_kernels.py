"""FIER's decode step in Triton: scores from 1-bit keys, and attention on the chosen tokens. NOT RUN on a GPU by us.

Tested against the torch oracle in Triton's interpreter only, which gives no measure of speed. No engine uses it yet:
what is missing is a backend that keeps `KeyCodes` beside vLLM's CUDA cache, as `fier_attention` does on the CPU, and
that was not written without a GPU to run it on. No step depends on the values of the data, so CUDA graphs could stay
on.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ....specializers.methods.fier.key_retrieval import WORD_BITS
from ....specializers.shelf.fier_settings import FierSettings

__all__ = ["decode", "score_tokens"]

TOKENS_AT_ONCE = 64


@triton.jit
def _score(
    query, words, low, high, table, lengths, scores,
    blocks, groups_per_block, sinks,
    SHARED: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    row, head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, groups = tl.num_programs(1), tl.num_programs(2)
    closed = tl.load(lengths + row) // GROUP
    place = tl.arange(0, GROUP)
    out = scores + ((row * heads + head) * groups + group) * GROUP + place
    if group >= closed:
        tl.store(out, tl.full([GROUP], float("-inf"), tl.float32))
    else:
        block = tl.load(table + row * blocks + group // groups_per_block)
        page = (block.to(tl.int64) * groups_per_block + group % groups_per_block) * heads + head
        found = tl.zeros([GROUP], tl.float32)
        channel = tl.arange(0, WORD)
        for word in tl.static_range(D // WORD):
            at = word * WORD + channel
            q = tl.zeros([WORD], tl.float32)
            for one in tl.static_range(SHARED):
                q += tl.load(query + ((row * heads + head) * SHARED + one) * D + at).to(tl.float32)
            least = tl.load(low + page * D + at).to(tl.float32)
            step = q * (tl.load(high + page * D + at).to(tl.float32) - least)
            code = tl.load(words + (page * (D // WORD) + word) * GROUP + place)
            bits = (code[:, None] >> channel[None, :]) & 1
            found += tl.sum(bits.to(tl.float32) * step[None, :], 1) + tl.sum(q * least, 0)
        tl.store(out, tl.where(group * GROUP + place < sinks, float("inf"), found))


@triton.jit
def _attend(
    query, keys, values, table, positions, counts, out,
    blocks, block_tokens, most, scale,
    SHARED: tl.constexpr, D: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row, q_head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1) // SHARED
    head = q_head // SHARED
    count = tl.load(counts + row)
    channel = tl.arange(0, D)
    here = (row * heads * SHARED + q_head) * D + channel
    q = tl.load(query + here).to(tl.float32) * scale
    best, total = float("-inf"), 0.0
    sums = tl.zeros([D], tl.float32)
    for first in range(0, count, AT_ONCE):
        at = first + tl.arange(0, AT_ONCE)
        known = at < count
        position = tl.load(positions + (row * heads + head) * most + at, mask=known, other=0)
        block = tl.load(table + row * blocks + position // block_tokens, mask=known, other=0).to(tl.int64)
        token = ((block * block_tokens + position % block_tokens) * heads + head)[:, None] * D + channel[None, :]
        k = tl.load(keys + token, mask=known[:, None], other=0.0).to(tl.float32)
        logit = tl.where(known, tl.sum(k * q[None, :], 1), float("-inf"))
        higher = tl.maximum(best, tl.max(logit, 0))
        weight = tl.exp(logit - higher)
        v = tl.load(values + token, mask=known[:, None], other=0.0).to(tl.float32)
        before = tl.exp(best - higher)
        sums = sums * before + tl.sum(weight[:, None] * v, 0)
        total = total * before + tl.sum(weight, 0)
        best = higher
    tl.store(out + here, (sums / total).to(out.dtype.element_ty))


def score_tokens(
    query: torch.Tensor,
    words: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    settings: FierSettings,
    block_tokens: int,
) -> torch.Tensor:
    """Scores [R, h, tokens of the table] of one query per sequence; -inf where no whole group is, inf for the sinks.

    `query` [R, H, d]; `words` [pages, h, d / 32, g] int32, `low` and `high` [pages, h, d] of the groups of slots (see
    `pack_bits`, `KeyCodes`), page = slot // g; `table` [R, blocks] and `lengths` [R] int32. All contiguous.
    """
    (rows, q_heads, d), (_, heads, _, group) = query.shape, words.shape
    groups_per_block = block_tokens // group
    groups = table.shape[1] * groups_per_block
    scores = torch.empty(rows, heads, groups * group, dtype=torch.float32, device=query.device)
    launch: Any = _score[(rows, heads, groups)]
    launch(
        query, words, low, high, table, lengths, scores,
        table.shape[1], groups_per_block, settings.sink_tokens,
        SHARED=q_heads // heads, D=d, GROUP=group, WORD=WORD_BITS,
    )  # fmt: skip
    return scores


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    words: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    settings: FierSettings,
    scale: float,
) -> torch.Tensor:
    """Attention [R, H, d] of one query per sequence on its best tokens and its tail: `retrieval_attention` on pages.

    `keys` and `values` are [blocks, tokens of a block, h, d]; the rest as in `score_tokens`. Contexts with no more
    whole-group tokens than the budget are attended whole; the caller must not call it for contexts below the minimum.
    Of equal scores any may be taken.
    """
    (rows, q_heads, d), (_, block, heads, _) = query.shape, keys.shape
    group, budget = settings.group_tokens, settings.budget_tokens
    closed = lengths // group * group
    width = table.shape[1] * block
    most = min(budget, width) + group
    whole = torch.arange(most, device=query.device).expand(rows, heads, most)
    if width <= budget:
        positions, counts = whole, lengths
    else:
        scores = score_tokens(query, words, low, high, table, lengths, settings, block)
        best = scores.topk(budget, dim=-1, sorted=False).indices
        tail = (closed[:, None] + torch.arange(group, device=query.device)).unsqueeze(1).expand(rows, heads, group)
        dense = closed <= budget
        positions = torch.where(dense[:, None, None], whole, torch.cat([best, tail], -1))
        counts = torch.where(dense, lengths, budget + lengths - closed)
    out = torch.empty_like(query)
    launch: Any = _attend[(rows, q_heads)]
    launch(
        query, keys, values, table, positions.int().contiguous(), counts.int(), out,
        table.shape[1], block, most, scale,
        SHARED=q_heads // heads, D=d, AT_ONCE=TOKENS_AT_ONCE,
    )  # fmt: skip
    return out
