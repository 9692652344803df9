"""Which Ray, how many replicas of each engine, and how long they are waited for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ...router.placement.placement import PlacementCosts

__all__ = ["RaySettings"]


class RaySettings(BaseModel):
    """Bounds of a `RayBackend`; unknown fields and values out of range are refused. `engine.*` holds for each replica.

    `address` is `HOST:PORT` of a cluster's head, or `auto` for the cluster this machine belongs to; None starts a Ray
    of our own here and ends it. It has `connect_timeout_s` to answer. A Ray of our own keeps `object_store_mib` for
    messages that are too long to go inline.

    Each engine half has `replicas`, with `engine.threads` CPU threads each, by default an equal share of this machine's
    cores. With `pin_cores` a replica computes on cores of its own and no others. On GPU machines a replica gets
    `engine.tensor_parallel` × `engine.data_parallel` GPUs. `overhead_mib` is what a replica takes beside weights and
    key-value cache: two processes that have loaded torch and vLLM, and Ray's own.

    An ask is tried at `tries` replicas at most. Whether replicas have come or gone is looked at every
    `membership_every_s`; one that does not answer Serve's `health_every_s` question within `health_timeout_s` is
    replaced. `conversations_kept` is how many prompts are remembered for each replica as being in its prefix
    cache; `costs` is what placement reckons with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(default=None, pattern=r"^(auto|[^/\s:]+:\d{1,5})$")
    connect_timeout_s: float = Field(default=20.0, gt=0)
    object_store_mib: int = Field(default=100, ge=80)
    replicas: int = Field(default=2, ge=1, le=10_000)
    pin_cores: bool = True
    overhead_mib: int = Field(default=1800, ge=0)
    tries: int = Field(default=4, ge=1, le=100)
    membership_every_s: float = Field(default=0.2, gt=0)
    health_every_s: float = Field(default=2.0, gt=0)
    health_timeout_s: float = Field(default=10.0, gt=0)
    conversations_kept: int = Field(default=1024, ge=1)
    costs: PlacementCosts = PlacementCosts()
