"""The table of docs/models.md: for a tiny base of every family and every capability, right or refused.

Right means compared: what the engine serves with transformers and peft; pruned weights with the base without what was
dropped; quantised ones, in the engine, with their own dequantised values. Trained adapters are checked on their base.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
from transformers import AutoConfig

from metier.agents import Message, TrafficRow, write_traffic
from metier.agents.errors import MetierError
from metier.agents.messages import Ask
from metier.runtime.engines.pool import EnginePool
from metier.specializers import Recipe, Shelf, produce
from metier.specializers.machine.number_types import DELTA_RULE
from metier.specializers.shelf.variant import Variant
from tests.runtime.conftest import TINY
from tests.runtime.engines.served_families import served_differences
from tests.tiny_families import write_tiny_family

__all__ = ["CAPABILITIES", "RIGHT", "cells_of"]

RIGHT = "right"
TOLERANCE = 1e-4
"""Nats, in float32."""

TOLERANCE_BFLOAT16 = 0.1
"""Nats, of families that the engine computes in bfloat16 only."""

_TRAINED = {"steps": 2, "batch_rows": 2, "warmup_steps": 1, "dtype": "float32"}

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora", "rank": 2, **_TRAINED},
    "T-REX": {"method": "trex", "r1": 2, "r2": 4, **_TRAINED},
    "width": {"method": "width_pruning", "intermediate_size": 96},
    "depth": {"method": "depth_pruning", "layers": 3, "score": "random"},
    "PAT": {"method": "pat", "hidden_size": 32, "lora_rank": 2, "operator_rank": 2, "calibration_rows": 2, **_TRAINED}
    | {"steps": 6},
    "W8A8": {"method": "ptq", "scheme": "w8a8", "perplexity_windows": 0},
    "NPFT": {"method": "npft", "rank": 2, **_TRAINED},
    "FIER": {"method": "fier", "budget_tokens": 64, "min_context_tokens": 64, "dense_layers": 1},
}
"""What a recipe makes, by the name of its column."""

CAPABILITIES = ("base", "adapters", *METHODS)


def cells_of(family: str, work: Path) -> dict[str, str]:
    """Capability → "right", or why it is refused; raises whatever is neither."""
    base = write_tiny_family(work / "base", family)
    with_adapters = _cell(lambda: _serve(base, work))
    alone = RIGHT if with_adapters == RIGHT else _cell(lambda: _serve(base, work, adapters=False))
    found = {"base": alone, "adapters": with_adapters}
    for name, method in METHODS.items():
        found[name] = _cell(lambda name=name, method=method: _make(name, method, base, work / name))  # type: ignore[misc]
    return found


def _cell(work: Callable[[], None]) -> str:
    try:
        work()
    except MetierError as error:
        # No path and no set of vLLM's, so that the same refusal reads the same everywhere.
        return re.sub(r"\S*/\S*", "…", error.problem).partition(" in {")[0]
    return RIGHT


def _serve(base: Path, work: Path, *, adapters: bool = True) -> None:
    narrow = AutoConfig.from_pretrained(base).model_type in DELTA_RULE
    settings = TINY.model_copy(update={"dtype": "bfloat16"}) if narrow else TINY
    differences = served_differences(base, work, adapters=adapters, settings=settings)
    tolerance = TOLERANCE_BFLOAT16 if narrow else TOLERANCE
    assert all(difference <= tolerance for difference in differences.values()), differences


def _make(name: str, method: dict[str, Any], base: Path, folder: Path) -> None:
    folder.mkdir()
    write_traffic(folder / "rows.jsonl", _rows())
    recipe = {"name": "made", "data": {"traffic": "rows.jsonl"}, "methods": [method], "folder": folder}
    shelf = Shelf(folder / "shelf")
    variant = produce(Recipe.model_validate(recipe), shelf=shelf, base=base)
    if name == "W8A8":
        anyio.run(_start, variant, shelf.path(variant), base)


async def _start(variant: Variant, folder: Path, base: Path) -> None:
    """Ask an engine on new weights once: before that it compares what it computes with what the variant's card says."""
    ask = Ask(
        run_id="run",
        step_path="ask",
        role="solver",
        messages=(Message(role="user", content="Add 2 and 3."),),
        variant=variant.name,
        max_tokens=2,
    )
    async with EnginePool(base, lambda _: (variant, folder), TINY, adapters=False) as pool:
        await pool.reply(ask)


def _rows() -> list[TrafficRow]:
    return [
        TrafficRow(
            role="solver",
            messages=(Message(role="user", content=f"{a} plus {b}" + " please" * b),),
            reply=f'{{"value":{a + b}}}',
            score=1.0,
            task=f"{a} plus {b}",
        )
        for a in range(4)
        for b in range(3)
    ]
