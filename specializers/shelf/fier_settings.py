"""How an engine retrieves keys at decode: the settings of FIER, part of a variant's engine half."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ...agents.frozen_model import FrozenModel

__all__ = ["HEAD_DIMS", "MAX_SHARED_HEADS", "FierSettings"]

HEAD_DIMS = (32, 64, 96, 128, 256)
"""Widths of heads that retrieval is written for: the kernels' own list."""

MAX_SHARED_HEADS = 16
"""Most query heads on one key-value head that the kernels take."""


class FierSettings(FrozenModel):
    """FIER: exact attention on the tokens that 1-bit keys choose, anew at each decode step.

    >>> FierSettings(budget_tokens=256).label
    'fier-256-32-2-2048-4'
    """

    budget_tokens: int = Field(default=512, ge=1, le=1 << 20)
    """Tokens that a key-value head attends to."""

    group_tokens: Literal[32, 64, 128] = 32
    """Tokens that share two levels per channel. Fewer are more exact and cost more memory."""

    dense_layers: int = Field(default=2, ge=0)
    """The first layers, this many, attend to all tokens."""

    min_context_tokens: int = Field(default=2048, ge=0)
    """Every layer attends to all tokens while a context is shorter than this."""

    sink_tokens: int = Field(default=4, ge=0)
    """The first tokens of a context, this many, are always among those chosen."""

    @model_validator(mode="after")
    def _sinks_fit(self) -> Self:
        if self.sink_tokens > self.budget_tokens:
            raise ValueError(f"sink_tokens {self.sink_tokens} are more than budget_tokens {self.budget_tokens}")
        return self

    @property
    def label(self) -> str:
        """All settings in one word, as part of an engine's identity."""
        numbers = (self.budget_tokens, self.group_tokens, self.dense_layers, self.min_context_tokens, self.sink_tokens)
        return "fier-" + "-".join(map(str, numbers))

    def cache_share(self, layers: int, element_bytes: int) -> float:
        """Memory beside the key-value cache, as a share of it: in layers that retrieve, a row copy of K and the codes.

        With bfloat16 and groups of 32 that is 0.5 + 0.0625 of such a layer's cache.
        """
        bits = 8 * element_bytes
        codes = (1 / bits + 2 / self.group_tokens) / 2
        return (0.5 + codes) * max(layers - self.dense_layers, 0) / layers
