"""How an engine retrieves keys at decode: the settings of FIER, part of a variant's engine half."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["HEAD_DIMS", "FierSettings"]

HEAD_DIMS = (64, 128)
"""Widths of heads that retrieval is written for."""


class FierSettings(BaseModel):
    """Exact attention on `budget_tokens` tokens per key-value head, chosen anew at each decode step by 1-bit keys.

    `group_tokens` share two levels per channel: fewer are finer and cost more memory. The first `dense_layers` layers
    attend to everything, as does every layer while a context is shorter than `min_context_tokens`. The first
    `sink_tokens` tokens are always among those chosen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget_tokens: int = Field(default=512, ge=1, le=1 << 20)
    group_tokens: Literal[32, 64, 128] = 32
    dense_layers: int = Field(default=2, ge=0)
    min_context_tokens: int = Field(default=2048, ge=0)
    sink_tokens: int = Field(default=4, ge=0)

    @model_validator(mode="after")
    def _sinks_fit(self) -> Self:
        if self.sink_tokens > self.budget_tokens:
            raise ValueError(f"sink_tokens {self.sink_tokens} are more than budget_tokens {self.budget_tokens}")
        return self

    @property
    def label(self) -> str:
        """All of it in one word, for what tells engines apart."""
        numbers = (self.budget_tokens, self.group_tokens, self.dense_layers, self.min_context_tokens, self.sink_tokens)
        return "fier-" + "-".join(map(str, numbers))

    def cache_share(self, layers: int, element_bytes: int) -> float:
        """Memory beside the key-value cache, as a share of it: in layers that retrieve, a row copy of K and the codes.

        With bfloat16 and groups of 32 that is 0.5 + 0.0625 of such a layer's cache.
        """
        bits = 8 * element_bytes
        codes = (1 / bits + 2 / self.group_tokens) / 2
        return (0.5 + codes) * max(layers - self.dense_layers, 0) / layers
