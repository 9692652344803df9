"""Multi-LoRA in plain torch: the path taken where the C++ operators cannot be built, and their oracle.

Shapes: x [tokens, d_in], y [tokens, d_out]; A of a slice [slots, 1, rank, d_in], B [slots, 1, width, rank], as vLLM
stacks them. Rows are grouped by adapter slot, so each product runs once per adapter in the batch; rows of the base
model are in no group and are never touched. (Stock vLLM 0.32 indexes the stack with -1 for them: the last slot.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .trex_gate import TrexGate, gated_lanes

__all__ = ["RowGroup", "add_lora", "expand", "rows_by_slot", "shrink"]

RowGroup = tuple[int, torch.Tensor]


def rows_by_slot(slots: torch.Tensor) -> list[RowGroup]:
    """Group row numbers by adapter slot: `slots` int64 [rows], negative for the base model."""
    used = torch.unique(slots)
    return [(int(slot), torch.nonzero(slots == slot).view(-1)) for slot in used if int(slot) >= 0]


def shrink(
    h: torch.Tensor | Sequence[torch.Tensor],
    x: torch.Tensor,
    a_stacked: Sequence[torch.Tensor],
    groups: Sequence[RowGroup],
    scale: float = 1.0,
) -> None:
    """Add `scale` A x to h: one fp32 [tokens, rank] per slice, in place."""
    for slot, rows in groups:
        group_x = x.index_select(0, rows).float()
        for h_slice, a in zip(h, a_stacked, strict=True):
            h_slice.index_add_(0, rows, group_x @ a[slot, 0].float().t(), alpha=scale)


def expand(
    y: torch.Tensor,
    h: torch.Tensor | Sequence[torch.Tensor],
    b_stacked: Sequence[torch.Tensor],
    groups: Sequence[RowGroup],
    output_slices: Sequence[int],
    offset: int = 0,
) -> None:
    """Add B h to y, slice after slice from column `offset` on, in place; the sum is rounded once."""
    for h_slice, b, width in zip(h, b_stacked, output_slices, strict=True):
        columns = y[:, offset : offset + width]
        for slot, rows in groups:
            delta = h_slice.index_select(0, rows).float() @ b[slot, 0].float().t()
            columns[rows] = (columns[rows].float() + delta).to(y.dtype)
        offset += width


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a_stacked: Sequence[torch.Tensor],
    b_stacked: Sequence[torch.Tensor],
    groups: Sequence[RowGroup],
    output_slices: Sequence[int],
    scale: float = 1.0,
    *,
    gates: Mapping[int, Sequence[TrexGate | None]] | None = None,
    intuition: torch.Tensor | None = None,
) -> None:
    """y[t] += scale * B_s A_s x[t] for every row t of every group (slot s, rows), slice by slice, in place.

    `gates` holds, for the slots of T-REX adapters, the gate of each slice: there B_s z(x[t], c[t]) is added instead.
    `intuition` is c, fp32 [tokens, ≥ r1·r2]; rows of other adapters may hold anything.
    """
    if not groups:
        return
    h = [x.new_zeros((x.shape[0], a.shape[2]), dtype=torch.float32) for a in a_stacked]
    shrink(h, x, a_stacked, groups, scale)
    for slot, rows in groups:
        for h_slice, gate in zip(h, (gates or {}).get(slot, ()), strict=False):
            if gate is not None:
                apply_gate(h_slice, rows, gate, intuition)
    expand(y, h, b_stacked, groups, output_slices)


def apply_gate(h: torch.Tensor, rows: torch.Tensor, gate: TrexGate, intuition: torch.Tensor | None) -> None:
    """Replace the lanes of some rows of h, [A x; W_r x], by z and zeros, in place; without c the task term is 0."""
    lanes = h.index_select(0, rows)
    c = torch.zeros(len(rows), gate.shape.experts) if intuition is None else intuition[rows, : gate.shape.experts]
    z = gated_lanes(lanes, gate, c)
    h[rows] = torch.nn.functional.pad(z, (0, h.shape[1] - gate.shape.r2))
