"""The interface that every form of the engine has, and what passes through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ...agents.backend import OnText
from ...agents.messages import Ask, Reply, Usage
from ..slots.adapter import LoadedAdapter, SwapCost

__all__ = ["Engine", "EngineCounters", "EngineRequest", "OnAbandoned"]


OnAbandoned = Callable[[Ask, Usage], None]


@dataclass(frozen=True)
class EngineRequest:
    """One ask as an engine gets it. `on_abandoned` is called with the usage of an ask that never got its reply.

    `intuition` is the run's semantic vector c [r1·r2] where the adapter is a T-REX one, None elsewhere.
    """

    ask: Ask
    adapter: LoadedAdapter | None = None
    intuition: tuple[float, ...] | None = None
    on_abandoned: OnAbandoned | None = None


@dataclass(frozen=True)
class EngineCounters:
    """What an engine has done since it was ready.

    `cpu_s` is all CPU time of the engine: the sum over replies, plus `abandoned_cpu_s` (per role, asks that
    were cancelled or failed), plus `overhead_cpu_s` (idle spinning, charged to no ask). `start_cpu_s` came before.
    `busy_s` is the time that its steps took, 0 where it is not known.
    """

    name: str
    cpu_s: float = 0.0
    abandoned_cpu_s: Mapping[str, float] = field(default_factory=dict)
    overhead_cpu_s: float = 0.0
    busy_s: float = 0.0
    start_s: float = 0.0
    start_cpu_s: float = 0.0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    asks: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0


class Engine(Protocol):
    """One running vLLM engine, in this process or in processes of its own."""

    name: str

    async def generate(self, request: EngineRequest, on_text: OnText | None = None) -> Reply:
        """Answer one ask; `on_text` is called in the event loop with each new piece of text.

        Cancelling the call aborts the ask in the engine. Raises: AskRejectedError (this ask cannot be served),
        EngineDeadError (the engine is gone), EngineError (the engine failed on this ask).
        """
        ...

    async def add_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """Load an adapter; raises AdapterError, after which its number must not be used again."""
        ...

    async def remove_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """Unload an adapter; no ask may be using it."""
        ...

    def write_off(self, role: str, cpu_s: float) -> None:
        """Charge a swap's CPU seconds, which no reply took, to the role's abandoned account."""
        ...

    def counters(self) -> EngineCounters:
        """What the engine has done so far."""
        ...

    async def close(self) -> None:
        """Abort what runs and free what can be freed; closing twice is harmless."""
        ...
