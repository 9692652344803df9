"""FIER inside vLLM's CPU engine: an attention backend that retrieves at decode and is stock everywhere else.

It takes the name of the CPU backend, the only one vLLM's CPU platform gives out, and hands the stock implementation
to every engine whose `additional_config` does not ask for retrieval. Prefill, steps that mix prefill with decode, and
steps whose contexts are all shorter than the minimum run stock attention. A prompt whose last piece is one token
looks like a decode step, and is one here.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ....specializers.shelf.fier_settings import FierSettings
from ..wire import FIER_KEY
from .fier_cpu import SideCache, load_operators, operators_trusted, unsupported

__all__ = ["FierAttention", "FierBackend", "install"]

log = logging.getLogger(__name__)

ROW_LAYOUT = "vec"
"""The cache layout whose values lie token by token."""

TILED_LAYOUT = "amx"
"""What vLLM takes instead where the processor has AMX tiles: the same shape, its values interleaved for the tiles."""


class FierBackend(CPUAttentionBackend):  # type: ignore[misc]
    """The CPU backend, with the implementation that the engine being built is configured for."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """FIER's implementation where the engine's configuration has its settings, else vLLM's own."""
        return FierAttention if FIER_KEY in get_current_vllm_config().additional_config else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The builder that keeps values token by token in engines that retrieve."""
        return FierMetadataBuilder


class FierMetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """vLLM's builder; an engine that retrieves reads values by token, so it cannot use AMX's layout."""

    isa: str

    def _set_isa_to_layers(self, layer_names: list[str]) -> None:
        if self.isa == TILED_LAYOUT and FIER_KEY in self.vllm_config.additional_config:
            self.isa = ROW_LAYOUT
        super()._set_isa_to_layers(layer_names)


class FierAttention(CPUAttentionBackendImpl):  # type: ignore[misc]
    """Attention of one layer; see `CPUAttentionBackendImpl` for shapes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.retrieval = FierSettings.model_validate(config.additional_config[FIER_KEY])
        self.side: SideCache | None = None
        self.steps = 0
        self._stock: bool | None = None
        self._blocks = 0
        if not operators_trusted():
            load_operators()

    def _stays_stock(self, layer: Any, kv_cache: torch.Tensor) -> bool:
        """Whether this layer always keeps stock attention; logs why, unless it is one of the dense layers."""
        if self._stock is None:
            if extract_layer_index(layer.layer_name) < self.retrieval.dense_layers:
                self._stock = True
                return True
            reason = unsupported(self, kv_cache.dtype)
            if not reason and layer.isa != ROW_LAYOUT:
                reason = f"the cache layout {layer.isa!r} ({ROW_LAYOUT!r} is known)"
            if not reason and kv_cache.shape[2] % self.retrieval.group_tokens:
                reason = f"blocks of {kv_cache.shape[2]} tokens, no multiple of {self.retrieval.group_tokens}"
            if reason:
                log.warning("metier: %s keeps stock attention, because it has %s", layer.layer_name, reason)
            self._stock = bool(reason)
        return self._stock

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store keys and values as vLLM does, then the keys once more, and codes of the groups they fill."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        # Called for every layer of every step, also for short contexts: what does not change is looked up once.
        if self._stock or (self._stock is None and self._stays_stock(layer, kv_cache)):
            return
        if self._blocks != kv_cache.shape[0]:
            self._blocks, heads, block, _ = kv_cache.shape
            self.side = SideCache.allocate(self._blocks, block, heads, self.head_size, kv_cache.dtype, self.retrieval)
        assert self.side is not None
        self.side.store(key, slot_mapping, native=operators_trusted())

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a step: by retrieval where every sequence has one query token and one context is long enough."""
        md = attn_metadata
        if (
            self.side is None
            or md is None
            or md.max_query_len != 1
            or not md.causal
            or md.max_seq_len < max(self.retrieval.min_context_tokens, self.retrieval.budget_tokens + 1)
        ):
            return super().forward(layer, query, key, value, kv_cache, md, output, output_scale, output_block_scale)
        blocks, heads, block, _ = kv_cache.shape
        values = kv_cache.view(blocks, heads, 2 * block, -1).chunk(2, dim=2)[1]
        n = len(md.seq_lens)
        self.steps += 1
        self.side.decode(
            output[:n].view(n, self.num_heads, self.head_size),
            query[:n].view(n, self.num_heads, self.head_size),
            values,
            md.block_table,
            md.seq_lens,
            scale=self.scale,
            native=operators_trusted(),
        )
        return output


def install() -> str:
    """Make vLLM's CPU platform use our backend; engines without retrieval settings keep the stock implementation."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.FierBackend")
    return "active"
