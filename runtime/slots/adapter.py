"""An adapter as engines know it, and what loading one costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["LoadedAdapter", "SwapCost"]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter as engines know it: its number (`lora_int_id`), its content id, its folder."""

    number: int
    id: str
    path: Path


@dataclass(frozen=True)
class SwapCost:
    """What loading or removing an adapter took: wall and CPU seconds."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
