"""How simulated programs are served: what can be tried without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from ...agents.frozen_model import FrozenModel
from .placing import PlacementName

__all__ = ["ServingPlan"]

Order = Literal["first_come", "shortest_first"]


class ServingPlan(FrozenModel):
    """How the programs are to be served: everything that can be tried without an engine."""

    concurrency: int = Field(default=16, ge=1)
    """Programs that go on at the same time."""

    replicas: int = Field(default=1, ge=1, le=10_000)
    """Replicas that answer."""

    placement: PlacementName = "placed"
    """How a replica is chosen for an ask."""

    order: Order = "first_come"
    """In what order asks are answered."""

    adapter_slots: int = Field(default=4, ge=1)
    """Adapters that a replica holds at a time."""

    foresight: bool = True
    """Whether slots know which adapters the programs will use next. Else the longest idle is evicted."""

    foresight_asks: int = Field(default=16, ge=1)
    """How many asks ahead they look."""

    pin_asks: int = Field(default=2, ge=0)
    """An adapter needed within this many asks stays as long as another can go."""

    prefetch_asks: int = Field(default=1, ge=0)
    """An adapter needed within this many asks is loaded ahead."""

    pass_asks: int = Field(default=32, ge=0)
    """Asks that may overtake the first one waiting for a slot."""

    max_running: int = Field(default=16, ge=1)
    """Most asks of one step."""

    max_batch_tokens: int = Field(default=2048, ge=16)
    """Most tokens of one step."""

    block_tokens: int = Field(default=32, ge=1)
    """Tokens of one block of the prefix cache."""

    kv_tokens: int | None = Field(default=None, ge=1)
    """Tokens that a replica's key-value cache holds. None is no bound."""

    programs: int | None = Field(default=None, ge=1, le=10_000_000)
    """Programs to run; more than there are repeats them. None is those that were recorded."""

    variants: Mapping[str, str] = Field(default_factory=dict)
    """Role → variant or `base` that replaces the recorded one. What the role wrote stays."""

    driver_ask_s: float = Field(default=0.0, ge=0)
    """Seconds that the driver computes for each ask, one after the other. 0 leaves that out."""
