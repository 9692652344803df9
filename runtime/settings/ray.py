"""Which Ray cluster runs the engines, and how many replicas of each."""

from __future__ import annotations

from pydantic import Field

from ...agents.frozen_model import FrozenModel
from ...router.placement.placement import PlacementCosts

__all__ = ["RaySettings"]


class RaySettings(FrozenModel):
    """Which Ray runs the engines, how many replicas there are, and their bounds. `engine.*` holds for each replica.

    >>> RaySettings(replicas=4, address="auto").tries
    4
    """

    address: str | None = Field(default=None, pattern=r"^(auto|[^/\s:]+:\d{1,5})$")
    """`HOST:PORT` of a cluster's head, or `auto` for the cluster this machine belongs to. None starts a Ray here and
    ends it."""

    connect_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds that Ray has to answer."""

    object_store_mib: int = Field(default=100, ge=80)
    """Memory that a Ray started here keeps for messages too long to be sent inline, in MiB."""

    replicas: int = Field(default=2, ge=1, le=10_000)
    """Replicas of each engine. Each has `engine.threads` CPU threads, by default an equal share of this machine's
    cores. On GPU machines each gets `engine.tensor_parallel` × `engine.data_parallel` GPUs."""

    pin_cores: bool = True
    """Whether a replica computes on cores of its own and no others."""

    overhead_mib: int = Field(default=1800, ge=0)
    """Memory of a replica beside weights and key-value cache, in MiB: two processes that have loaded torch and vLLM,
    and Ray's own."""

    tries: int = Field(default=4, ge=1, le=100)
    """Replicas that one ask is tried at."""

    membership_every_s: float = Field(default=0.2, gt=0)
    """Seconds between two checks of which replicas there are."""

    health_every_s: float = Field(default=2.0, gt=0)
    """Seconds between two health checks of a replica, made by Ray Serve."""

    health_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that a replica has to answer a health check before it is replaced."""

    conversations_kept: int = Field(default=1024, ge=1)
    """Prompts that are remembered for each replica as being in its prefix cache."""

    costs: PlacementCosts = PlacementCosts()
    """Costs that decide where an ask is placed."""
