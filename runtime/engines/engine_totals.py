"""Counters of the engines of a session, added up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from .engine import EngineCounters

__all__ = ["added_up"]


def added_up(counters: Iterable[EngineCounters]) -> dict[str, dict[str, Any]]:
    """Engine name → its counters added up over restarts, with room for how many there were, and for prefetches."""
    totals: dict[str, dict[str, Any]] = {}
    for one in counters:
        row = asdict(one)
        name, abandoned = row.pop("name"), row.pop("abandoned_cpu_s")
        more = {"adapter_prefetches": 0, "restarts": 0, "abandoned_cpu_s": {}}
        total = totals.setdefault(name, {key: 0 for key in row} | more)
        for key, value in row.items():
            total[key] += value
        for role, cpu_s in abandoned.items():
            total["abandoned_cpu_s"][role] = total["abandoned_cpu_s"].get(role, 0.0) + cpu_s
    return totals
