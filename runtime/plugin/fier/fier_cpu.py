"""FIER's side cache and its decode step on the CPU: the compiled operators, or the same sums in torch.

Beside a layer's paged cache stand `rows` [slots, h, d], every key once more with its channels side by side, and
`pages` [slots / g, h, bytes], the 1-bit codes of each group of slots (layout in `fier_cpu_kernel.cpp`).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....agents.errors import PluginError
from ....specializers.methods.fier.key_retrieval import (
    WORD_BITS,
    KeyCodes,
    encode_keys,
    pack_bits,
    retrieval_attention,
    unpack_bits,
)
from ....specializers.shelf.fier_settings import HEAD_DIMS, MAX_SHARED_HEADS, FierSettings
from ..native_build import build_library

__all__ = ["SideCache", "load_operators", "operators_trusted", "unsupported"]

log = logging.getLogger(__name__)

KERNEL_SOURCE = Path(__file__).with_name("fier_cpu_kernel.cpp")
DTYPES = (torch.bfloat16, torch.float32)

_reason: str | None = None
_broken: str | None = None


def load_operators() -> str:
    """Make `torch.ops.metier.fier_*` available and return "" or the reason why they are not.

    Compiles them on the first use on a machine, then checks them against torch before they are trusted.
    `METIER_FIER_KERNEL=0` asks for torch.
    """
    global _reason, _broken
    if os.environ.get("METIER_FIER_KERNEL") == "0":
        _reason = "METIER_FIER_KERNEL=0"
        return _reason
    if _broken is not None:  # called by every layer: one attempt and one warning per process
        _reason = _broken
        return _reason
    try:
        if not hasattr(torch.ops.metier, "fier_decode"):
            torch.ops.load_library(str(build_library(KERNEL_SOURCE)))
        for dtype in DTYPES:
            _check_operators(dtype)
        _reason = ""
    except (PluginError, OSError, RuntimeError) as error:
        log.warning("metier: the C++ FIER operators are not used, the slower torch path is: %s", error)
        _reason = _broken = str(error)
    return _reason


def operators_trusted() -> bool:
    """Whether the compiled operators are in use in this process."""
    return _reason == ""


def _check_operators(dtype: torch.dtype) -> None:
    """Compare one step of two sequences with torch; raise PluginError when they differ."""
    generator = torch.Generator().manual_seed(0)
    settings = FierSettings(budget_tokens=40, min_context_tokens=0)
    cache = SideCache.allocate(6, 32, 2, 64, dtype, settings)
    keys = torch.randn(192, 2, 64, generator=generator).to(dtype)
    values = torch.randn(6, 2, 32, 64, generator=generator).to(dtype)
    query = torch.randn(2, 6, 64, generator=generator).to(dtype)
    table, lengths = torch.tensor([[4, 1, 0], [2, 3, 5]], dtype=torch.int32), torch.tensor([75, 96], dtype=torch.int32)
    cache.store(keys, torch.arange(192), native=True)
    found = [torch.empty_like(query) for _ in range(2)]
    for native, out in zip((True, False), found, strict=True):
        cache.decode(out, query, values, table, lengths, scale=0.125, native=native)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    if not torch.allclose(found[0].float(), found[1].float(), rtol=tolerance, atol=tolerance):
        worst = float((found[0].float() - found[1].float()).abs().max())
        raise PluginError(
            f"the compiled FIER operator is wrong by {worst:.3g} in {dtype}",
            expected="what the torch path computes",
            remedy="Set METIER_FIER_KERNEL=0 and report the processor and the compiler.",
        )


@dataclass(frozen=True)
class SideCache:
    """The side cache of one layer's cache of `blocks` blocks of `block` tokens."""

    rows: torch.Tensor
    pages: torch.Tensor
    settings: FierSettings

    @classmethod
    def allocate(
        cls, blocks: int, block: int, kv_heads: int, head_dim: int, dtype: torch.dtype, settings: FierSettings
    ) -> SideCache:
        """An empty side cache; the system allocates only the pages that are written."""
        group, element = settings.group_tokens, dtype.itemsize
        page = group * (head_dim // WORD_BITS) * 4 + 2 * head_dim * element
        slots = blocks * block
        return cls(
            rows=torch.zeros(slots, kv_heads, head_dim, dtype=dtype),
            pages=torch.zeros(slots // group, kv_heads, page, dtype=torch.uint8),
            settings=settings,
        )

    @property
    def bytes(self) -> int:
        """Memory when every slot is in use."""
        return int(self.rows.nbytes + self.pages.nbytes)

    def store(self, keys: torch.Tensor, slots: torch.Tensor, *, native: bool) -> None:
        """Take in the keys [n, h, d] of a step at their slots [n] (negative: none), and code the groups they fill."""
        if native:
            torch.ops.metier.fier_store.default(keys, slots, self.rows, self.pages, self.settings.group_tokens)
            return
        n = min(len(keys), len(slots))
        kept = slots[:n] >= 0
        at, group = slots[:n][kept], self.settings.group_tokens
        self.rows[at] = keys[:n][kept]
        full = at[at % group == group - 1] // group
        if len(full) == 0:
            return
        grouped = self.rows.view(-1, group, *self.rows.shape[1:])[full].transpose(1, 2)  # [groups, h, g, d]
        codes = encode_keys(grouped, group)
        words = pack_bits(codes.bits).flatten(2).contiguous().view(torch.uint8)
        levels = torch.cat([codes.low, codes.high], -1).flatten(2).contiguous().view(torch.uint8)
        self.pages[full] = torch.cat([words, levels], -1)

    def codes(self, groups: torch.Tensor) -> KeyCodes:
        """Codes [h, len(groups), ...] of groups named by number."""
        d, group = self.rows.shape[2], self.settings.group_tokens
        pages = self.pages[groups].transpose(0, 1).contiguous()
        size = d // 8 * group
        words = pages[..., :size].contiguous().view(torch.int32).unflatten(-1, (d // WORD_BITS, group))
        low, high = pages[..., size:].contiguous().view(self.rows.dtype).chunk(2, -1)
        return KeyCodes(unpack_bits(words, d), low, high)

    def decode(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        native: bool,
        wide: bool = True,
    ) -> None:
        """Write attention of one query per sequence, [R, H, d], to `out`.

        `values` is [blocks, h, block, d], `table` [R, blocks of a sequence] and `lengths` [R] are int32. `wide` allows
        AVX-512 where there is any.
        """
        s = self.settings
        if native:
            if query.stride()[1:] != (query.shape[2], 1):
                query = query.contiguous()
            torch.ops.metier.fier_decode.default(
                out, query, self.rows, self.pages, values, table, lengths, scale,
                s.budget_tokens, s.group_tokens, s.min_context_tokens, s.sink_tokens, wide,
            )  # fmt: skip
            return
        block, group = values.shape[2], s.group_tokens
        for row, length in enumerate(lengths[: len(query)].tolist()):
            places = torch.arange(length)
            blocks = table[row].long()[places // block]
            closed = length // group * group
            starts = (blocks * block + places % block)[:closed:group]
            dense = length < s.min_context_tokens or closed <= s.budget_tokens
            out[row] = retrieval_attention(
                query[row],
                self.rows[blocks * block + places % block],
                values[blocks, :, places % block],
                scale=scale,
                budget=length if dense else s.budget_tokens,
                group=group,
                sinks=s.sink_tokens,
                codes=None if dense else self.codes(starts // group),
            ).to(out.dtype)


def unsupported(impl: Any, dtype: torch.dtype) -> str:
    """Why a layer of vLLM's CPU attention must keep stock attention, "" where it need not."""
    checks = {
        f"heads of {impl.head_size} channels ({', '.join(map(str, HEAD_DIMS))} are known)": impl.head_size
        not in HEAD_DIMS,
        f"{str(dtype).removeprefix('torch.')} (bfloat16 and float32 are known)": dtype not in DTYPES,
        f"a key-value cache of type {impl.kv_cache_dtype}": impl.is_fp8_kv_cache,
        f"a sliding window of {impl.sliding_window} tokens": impl.sliding_window != -1,
        "ALiBi": impl.alibi_slopes is not None,
        "capped logits": bool(impl.logits_soft_cap),
        "learned attention sinks": impl.sinks is not None,
        "a cache shared between layers": impl.kv_sharing_target_layer_name is not None,
        f"attention of type {impl.attn_type}": impl.attn_type != "decoder",
        f"{impl.num_queries_per_kv} query heads on one key-value head": impl.num_queries_per_kv > MAX_SHARED_HEADS,
    }
    return ", ".join(what for what, met in checks.items() if met)
