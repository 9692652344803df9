"""T-REX's sizes and constants: one type for training, checking, export and serving."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError

__all__ = ["GateShape", "TrexShape", "read_trex_shape"]


@dataclass(frozen=True)
class GateShape:
    """Sizes and constants of one adapter's gates: `experts` = r1·r2, `rows` = what it needs of a slot."""

    r1: int
    r2: int
    k_tok: float
    k_task: float

    @property
    def experts(self) -> int:
        return self.r1 * self.r2

    @property
    def rows(self) -> int:
        return self.r1 + self.experts


@dataclass(frozen=True)
class TrexShape:
    """Sizes of a T-REX adapter: r1 rows of A and r2 columns of B per layer."""

    r1: int
    r2: int

    @property
    def experts(self) -> int:
        """Rank-one experts: r1·r2."""
        return self.r1 * self.r2

    @property
    def rows(self) -> int:
        """Rows it takes in a slot: A's and the router's."""
        return self.r1 + self.experts


def read_trex_shape(folder: Path) -> TrexShape | None:
    """Sizes of the T-REX adapter in `folder`, None where it holds another kind.

    Raises: AdapterError when its configuration cannot be read.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if config.get("peft_type") != "TREX":
            return None
        shape = TrexShape(int(config["trex"]["r1"]), int(config["trex"]["r2"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{folder / 'adapter_config.json'} cannot be read: {error!r}",
            expected="the configuration of an adapter, with the block `trex` where it is a T-REX one",
            remedy="Verify the variant, or make it again with `metier make`.",
        ) from error
    if min(shape.r1, shape.r2) < 1:
        raise AdapterError(f"{folder} says r1={shape.r1}, r2={shape.r2}", expected="r1 and r2 of at least 1")
    return shape
