"""An ask whose values are not finite affects no other ask, and is detected.

An adapter whose numbers overflow writes values that are not finite into its ask's blocks of the key-value cache. vLLM
0.32 hands such a block to the next request as it is. Attention multiplies the part of a block that is not filled yet
by a weight of zero, and zero times NaN is NaN: the next request's reply is lost too, whichever adapter it uses. vLLM
can clear blocks before anyone gets them, and does so for models whose state needs it (`needs_kv_cache_zeroing`). Here
it does so for all.

It also counts values of the logits that are not numbers, when `VLLM_COMPUTE_NANS_IN_LOGITS` is set, and puts the
result on a request's statistics (`is_corrupted`). Reading each row's largest value says the same for half the work,
and finds infinities too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

__all__ = ["clear_blocks", "install", "rows_not_finite"]


def clear_blocks(caches: Sequence[torch.Tensor], block_ids: Sequence[int]) -> None:
    """Fill blocks [blocks, …] of every layer's cache with zeros, in place; layers may share memory."""
    blocks = torch.tensor(block_ids, dtype=torch.long)
    for cache in {cache.data_ptr(): cache for cache in caches}.values():
        cache.index_fill_(0, blocks, 0)


def rows_not_finite(logits: torch.Tensor) -> torch.Tensor:
    """Which rows [rows] of logits [rows, words] hold NaN or plus infinity; minus infinity is a forbidden word."""
    return ~torch.isfinite(logits.amax(dim=-1))


def _zero_block_ids(self: Any, block_ids: list[int]) -> None:
    context = self.compilation_config.static_forward_context
    names = (name for group in self.kv_cache_config.kv_cache_groups for name in group.layer_names)
    caches = (getattr(context.get(name), "kv_cache", None) for name in names)
    clear_blocks([cache for cache in caches if isinstance(cache, torch.Tensor)], block_ids)


def _get_nans_in_logits(self: Any, logits: torch.Tensor | None) -> dict[str, int]:
    if logits is None:
        return {}
    lost = rows_not_finite(logits).tolist()
    rows = self.input_batch.req_id_to_index.items()
    return {request: int(lost[row]) for request, row in rows if row < len(lost)}


def install() -> str:
    """Have vLLM clear every block it allocates, and check the logits with `rows_not_finite`; returns "active"."""
    KVCacheConfig.needs_kv_cache_zeroing = property(lambda self: True)
    CPUModelRunner._zero_block_ids = _zero_block_ids
    GPUModelRunner._get_nans_in_logits = _get_nans_in_logits
    return "active"
