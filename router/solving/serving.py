"""How variants are served: memory, adapter slots, and the cost of a load, which all parts share."""

from __future__ import annotations

from pydantic import Field

from ...agents.frozen_model import FrozenModel

__all__ = ["Serving"]


class Serving(FrozenModel):
    """How variants are served: what an engine holds beside its checkpoint, and what loading an adapter costs.

    >>> Serving(kv_cache_mib=1024, adapter_slots=2).swap_s
    0.033
    """

    kv_cache_mib: float = Field(default=512, ge=0)
    """Key-value cache of each engine, in MiB. Every checkpoint has an engine of its own."""

    engine_mib: float = Field(default=0, ge=0)
    """What each engine holds beside checkpoint, cache and slots, in MiB."""

    process_mib: float = Field(default=0, ge=0)
    """What the process holds whatever it serves, in MiB."""

    adapter_slots: int = Field(default=4, ge=1)
    """Adapters that are resident in each engine."""

    slot_rank: int = Field(default=16, ge=1)
    """Rows of one slot."""

    swap_cpu_s: float = Field(default=0.033, ge=0)
    """CPU-seconds of loading an adapter."""

    swap_s: float = Field(default=0.033, ge=0)
    """Seconds that an ask waits for it."""

    running: int = Field(default=16, ge=1)
    """Runs that go on at once, which is what fills batches."""

    busy_s_per_cpu_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds that a CPU-second of the engines takes. None where that is not known."""
