"""The C++ LoRA operators (`lora_cpu_kernel.cpp`): built, checked against torch, and filled slot by slot."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ....agents.errors import PluginError
from ....specializers.adapters.trex_shape import TrexShape
from ..native_build import build_library
from . import lora_torch
from .trex_gate import TrexGate

__all__ = ["PACKED_DTYPES", "load_operators", "operators_trusted", "set_slot"]

log = logging.getLogger(__name__)

KERNEL_SOURCE = Path(__file__).with_name("lora_cpu_kernel.cpp")

PACKED_DTYPES = (torch.bfloat16, torch.float32)
"""Types of A and B that the operators take."""

_trusted = False


def load_operators() -> str:
    """Make `torch.ops.metier.lora_*` available; returns "", or the reason why they are not.

    Compiles them on the first use on a machine, then checks them against the torch path before they are trusted.
    """
    global _trusted
    _trusted = False
    if os.environ.get("METIER_LORA_KERNEL") == "0":
        return "METIER_LORA_KERNEL=0"
    try:
        if not hasattr(torch.ops.metier, "lora_linear"):
            torch.ops.load_library(str(build_library(KERNEL_SOURCE)))
        for dtype in PACKED_DTYPES:
            _check_operators(dtype)
    except (PluginError, OSError, RuntimeError) as error:
        log.warning("metier: the C++ LoRA operators are not used, the slower torch path is: %s", error)
        return str(error)
    _trusted = True
    return ""


def operators_trusted() -> bool:
    """Whether the compiled operators are in use in this process."""
    return _trusted


def _check_operators(dtype: torch.dtype) -> None:
    """Compare the operator with the torch path on one small mixed batch; raise PluginError when they differ."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    # Slot 0 is plain LoRA of rank 8, slot 1 T-REX (r1 = 2, r2 = 3) on the first slice and LoRA on the second.
    widths, d_in, rank, gate = (40, 24), 64, 8, TrexGate(TrexShape.released(2, 3), 4.0, 2.0)
    a = [random(2, 1, rank, d_in) / 8 for _ in widths]
    b = [random(2, 1, width, rank) for width in widths]
    b[0][1, 0, :, gate.shape.r2 :] = 0
    gates = {1: [gate, None]}
    slots = torch.tensor([1, -1, 0, 1, 0, -1, 1])
    c, row_of = torch.rand(2, gate.shape.experts, generator=generator), torch.tensor([0, -1, -1, 1, -1, -1, 0])
    x, y = random(len(slots), d_in), random(len(slots), sum(widths))
    wanted, got = y.clone(), y.clone()
    groups = lora_torch.rows_by_slot(slots)
    lora_torch.add_lora(wanted, x, a, b, groups, widths, gates=gates, intuition=c[row_of])
    step = torch.ops.metier.lora_step_open()
    layer = torch.ops.metier.lora_layer_open(step, d_in, widths, 2, dtype == torch.bfloat16)
    try:
        for slot in range(2):
            set_slot(layer, slot, [t[slot, 0] for t in a], [t[slot, 0] for t in b], gates.get(slot, [None, None]))
        torch.ops.metier.lora_step_plan(step, slots)
        torch.ops.metier.lora_step_intuition(step, c, row_of)
        torch.ops.metier.lora_linear(got, x, torch.tensor([layer]))
    finally:
        torch.ops.metier.lora_layer_close(layer)
        torch.ops.metier.lora_step_close(step)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    if not torch.allclose(got.float(), wanted.float(), rtol=tolerance, atol=tolerance * 10):
        worst = float((got.float() - wanted.float()).abs().max())
        raise PluginError(
            f"the compiled LoRA operator is wrong by {worst:.3g} in {dtype}",
            expected="the result of the torch path",
            remedy="Report the compiler and processor; METIER_LORA_KERNEL=0 uses the torch path.",
        )


def set_slot(
    number: int, slot: int, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], gates: Sequence[TrexGate | None]
) -> None:
    """Hand A [rows, d_in] and B [width, columns] of each slice to the operator's layer `number`.

    A slice with a gate keeps the rows and columns that the gate has, whatever the slot holds beyond.
    """
    pairs = list(zip(a, b, gates, strict=True))
    torch.ops.metier.lora_layer_set_slot(
        number,
        slot,
        [(rows[: gate.shape.rows] if gate else rows).contiguous() for rows, _, gate in pairs],
        [(columns[:, : gate.shape.r2] if gate else columns).contiguous() for _, columns, gate in pairs],
        [gate.shape.r1 if gate else 0 for gate in gates],
        [gate.token_gain if gate else 0.0 for gate in gates],
        [gate.task_gain if gate else 0.0 for gate in gates],
    )
