"""T-REX's sizes, constants and layout on disk: one place for training, checking, export and serving.

The layout: per layer lora_A [r1, d_in], lora_B [d_out, r2], lora_router [r1·r2, d_in], trex_omega [1] and
trex_gamma [1]; once, the semantic map (`semantic_map.py`). Row i of A and column j of B make expert i·r2 + j.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError
from ...agents.text_files import shown
from ..shelf.adapter_kinds import ADAPTER_KINDS
from .adapter_files import CONFIG, read_config

__all__ = [
    "K_TASK",
    "LAYER_PARTS",
    "MOST_EXPERTS",
    "MOST_GAIN",
    "R1",
    "R2",
    "SHARPNESS",
    "TREX",
    "TREX_FORMAT",
    "TrexShape",
    "check_format",
    "read_trex_shape",
    "shape_of_block",
]

TREX = ADAPTER_KINDS["trex"].peft_type
"""The `peft_type` of a T-REX adapter."""

TREX_FORMAT = 1
"""The version of the layout that this code writes and reads."""

SHARPNESS = 100.0
"""Both learned scalars go through sigmoid(100 x), as released: at 5e-5 an Adam step moves the argument by 0.005."""

R1, R2 = 4, 8
"""Rows of A and columns of B of a layer, unless a recipe says otherwise."""

K_TASK = 4.0
"""Weight of the intuition, as released."""

MOST_GAIN = 1_000.0
"""Highest weight of the token router and of the intuition. With slots of 512 rows the released rule gives 510."""

MOST_EXPERTS = 512
"""Most rows of A, and columns of B: no slot holds more."""

LAYER_PARTS = {
    "lora_A.weight": ("r1", "d_in"),
    "lora_B.weight": ("d_out", "r2"),
    "lora_router.weight": ("r1·r2", "d_in"),
    "trex_omega": ("1",),
    "trex_gamma": ("1",),
}
"""The tensors of one adapted layer and what their sizes are."""


@dataclass(frozen=True)
class TrexShape:
    """Sizes and constants of a T-REX adapter: `k_tok` weighs the token router, `k_task` the intuition."""

    r1: int
    r2: int
    k_tok: float
    k_task: float

    @classmethod
    def released(cls, r1: int = R1, r2: int = R2, *, k_tok: float | None = None, k_task: float = K_TASK) -> TrexShape:
        """A shape with the released code's weights, unless others are given: k_tok is r1·r2 there."""
        return cls(r1, r2, float(r1 * r2 if k_tok is None else k_tok), float(k_task))

    @property
    def experts(self) -> int:
        """Rank-one experts, and rows of the router: r1·r2."""
        return self.r1 * self.r2

    @property
    def most_gain(self) -> float:
        """The most that the gate's weights of all experts come to together: p sums to 1, c is cosines."""
        return self.k_tok + self.k_task * self.experts

    @property
    def rows(self) -> int:
        """Rows of a slot that a layer takes: A's and the router's."""
        return self.r1 + self.experts

    def layer_shapes(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of a layer from `d_in` to `d_out` channels, by the names of `LAYER_PARTS`."""
        sizes = {"1": 1, "r1": self.r1, "r2": self.r2, "r1·r2": self.experts, "d_in": d_in, "d_out": d_out}
        return {part: tuple(sizes[size] for size in meaning) for part, meaning in LAYER_PARTS.items()}


def read_trex_shape(folder: Path) -> TrexShape | None:
    """Shape of the T-REX adapter in `folder`, None where it holds another kind.

    Raises: AdapterError when its configuration cannot be read, or names what no T-REX adapter has.
    """
    config = read_config(folder)
    return shape_of_block(folder / CONFIG, config.get("trex")) if config.get("peft_type") == TREX else None


def shape_of_block(path: Path, block: object) -> TrexShape:
    """Shape in the `trex` block of the adapter configuration `path`; raises AdapterError naming what is wrong in it."""
    if not isinstance(block, dict):
        raise AdapterError(
            f"{path}: trex is {shown(block)}",
            expected="a block with format, r1, r2, k_tok, k_task, embed_id and prompt_rule",
            remedy="Make the adapter with `method: trex`, or copy its folder again.",
        )
    check_format(path, block)
    for name in ("r1", "r2"):
        value = block.get(name)
        if type(value) is not int or not 1 <= value <= MOST_EXPERTS:
            raise AdapterError(
                f"{path}: trex.{name} is {shown(value)}", expected=f"a whole number from 1 to {MOST_EXPERTS}"
            )
    for name in ("k_tok", "k_task"):
        value = block.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_GAIN:
            raise AdapterError(f"{path}: trex.{name} is {shown(value)}", expected=f"a number from 0 to {MOST_GAIN:g}")
    return TrexShape(block["r1"], block["r2"], float(block["k_tok"]), float(block["k_task"]))


def check_format(where: object, block: dict[str, Any]) -> None:
    """Raise AdapterError unless the `trex` block is of the version that this code reads."""
    if block.get("format") != TREX_FORMAT:
        raise AdapterError(
            f"{where}: trex.format is {shown(block.get('format'))}",
            expected=f"format {TREX_FORMAT}, the layout this version reads",
            remedy="Serve it with the version of metier that made it, or make it again from its recipe.",
        )
