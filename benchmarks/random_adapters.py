"""Random LoRAs on a shelf of their own: what adapters cost does not depend on what they say."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metier.agents import PROMPT_LAYOUT
from metier.specializers.shelf.base_model import base_fingerprint
from metier.specializers.shelf.shelf import Shelf
from metier.specializers.shelf.variant import AskSpec, EngineSpec, Variant

sys.path.insert(0, str(Path(__file__).parents[1]))

__all__ = ["random_variants", "shelve_random_adapters"]


def shelve_random_adapters(
    folder: Path, weights: Path, roles: Sequence[str], *, rank: int, dtype: str = "float32"
) -> dict[str, str]:
    """Put an adapter for each role on the shelf at `folder`/shelf: role → name of its variant."""
    shelf, names = Shelf(folder / "shelf"), {}
    for seed, role in enumerate(roles):
        staging = folder / f"staging-{role}"
        _write(staging, weights, rank, seed, dtype)
        names[role] = shelf.add(staging, name=f"random-{role}", record=_record(weights, rank)).name
    return names


def random_variants(folder: Path, weights: Path, names: Sequence[str], *, rank: int) -> dict[str, tuple[Variant, Path]]:
    """Adapters outside any shelf, for code that places asks on servers itself: name → record and folder."""
    found = {}
    for seed, name in enumerate(names):
        _write(folder / name, weights, rank, seed, "float32")
        found[name] = (Variant(id=f"{seed + 1:016x}", name=name, **_record(weights, rank)), folder / name)
    return found


def _write(folder: Path, weights: Path, rank: int, seed: int, dtype: str) -> None:
    from tests.tiny_model import write_random_lora

    write_random_lora(folder / "adapter", weights, rank=rank, seed=seed, weight_std=0.01, dtype=dtype)


def _record(weights: Path, rank: int) -> dict[str, Any]:
    base = base_fingerprint(weights)
    return {
        "base": base,
        "prompt_layout": PROMPT_LAYOUT,
        "engine": EngineSpec(base=base),
        "ask": AskSpec(adapter="lora", rank=rank),
    }
