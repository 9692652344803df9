"""The T-REX token gate in plain torch: the path where the C++ operators are missing, and their oracle.

An adapted linear layer mixes r1·r2 rank-one experts b_j a_iᵀ, per token (T-REX, arXiv 2404.08985; the scalars are those
of the released code). In a slot of vLLM's LoRA tensors the router's rows lie below A's, so one product h gives
`[A x; W_r x]`, and the gate turns those lanes into the r2 inputs of B:

    p = softmax(W_r x)          G = k_tok·α·p + k_task·(1-α)·c,  α = σ(100·ω)
    z_j = Σ_i (A x)_i G_ij      y = W0 x + σ(100·γ)·B z          expert (i, j) has the number i·r2 + j

c is the semantic vector of the request ("intuition"), the same at every token and layer. σ(100·γ) is folded into the
two gains, so nothing is left to do after B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....specializers.adapters.trex_shape import SHARPNESS, TrexShape

__all__ = ["TrexGate", "gated_lanes", "gated_lanes_of_slots", "stacked_gates"]


@dataclass(frozen=True)
class TrexGate:
    """The gate of one adapted linear layer: its adapter's shape, and what its trained scalars make of its two weights.

    `token_gain` is σ(100·γ)·k_tok·α, `task_gain` σ(100·γ)·k_task·(1-α).
    """

    shape: TrexShape
    token_gain: float
    task_gain: float

    @classmethod
    def from_scalars(cls, shape: TrexShape, *, omega: float, gamma: float) -> TrexGate:
        """The gate of a layer from its trained scalars ω and γ and the adapter's constants."""
        alpha, strength = _sigmoid(SHARPNESS * omega), _sigmoid(SHARPNESS * gamma)
        return cls(shape, strength * shape.k_tok * alpha, strength * shape.k_task * (1.0 - alpha))


def gated_lanes(h: torch.Tensor, gate: TrexGate, c: torch.Tensor) -> torch.Tensor:
    """z [tokens, r2] from h [tokens, ≥ r1 + r1·r2] = [A x; W_r x] and c [tokens, r1·r2]; all fp32."""
    shape = gate.shape
    p = torch.softmax(h[:, shape.r1 : shape.rows], dim=-1)
    g = gate.token_gain * p + gate.task_gain * c
    by_pair = g.view(-1, shape.r1, shape.r2)
    return torch.einsum("ti,tij->tj", h[:, : shape.r1], by_pair)


def stacked_gates(gates: Sequence[TrexGate | None], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of one layer's gates by slot, for `gated_lanes_of_slots`; a slot without a gate holds plain LoRA.

    Returns `lane` int64 [slots + 1, 2, rank]: for each lane of a router its expert's input and output, else (0, -1);
    and `gain` fp32 [slots + 1, 2] of token and task. The last row, index -1, belongs to rows of the base model.
    """
    lane = torch.zeros(len(gates) + 1, 2, rank, dtype=torch.long)
    lane[:, 1] = -1
    gain = torch.zeros(len(gates) + 1, 2)
    for slot, gate in enumerate(gates):
        if gate is not None:
            shape = gate.shape
            expert = torch.arange(shape.experts)
            lane[slot, 0, shape.r1 : shape.rows] = expert // shape.r2
            lane[slot, 1, shape.r1 : shape.rows] = expert % shape.r2
            gain[slot] = torch.tensor([gate.token_gain, gate.task_gain])
    return lane, gain


def gated_lanes_of_slots(
    h: torch.Tensor, slots: torch.Tensor, c: torch.Tensor, lane: torch.Tensor, gain: torch.Tensor
) -> torch.Tensor:
    """What B's columns are multiplied by, for rows of any slots at once: [tokens, rank] like h.

    h fp32 [tokens, rank]; slots int64 [tokens], negative for the base; c fp32 [tokens, ≥ rank], padded with zeros;
    `lane` and `gain` as from `stacked_gates`. Rows of plain LoRA and of the base come back as they are. No step depends
    on the data but through indices, so the function can be captured in a CUDA graph.
    """
    pair = lane[slots]
    source, target = pair[:, 0], pair[:, 1]
    routed = target >= 0
    gated = routed.any(-1, keepdim=True)
    # A row without a router would be a softmax over nothing; its result is thrown away below.
    logits = h.masked_fill(~routed & gated, -math.inf)
    # The first router lane of a row is expert 0: c moves there by the number of lanes before it.
    first = torch.argmax(routed.to(torch.int8), dim=-1, keepdim=True)
    expert = (torch.arange(h.shape[1], device=h.device) - first).clamp_min(0)
    g = gain[slots, :1] * torch.softmax(logits, dim=-1) + gain[slots, 1:] * torch.gather(c, 1, expert)
    product = torch.where(routed, g * torch.gather(h, 1, source), 0.0)
    z = torch.zeros_like(h).scatter_add_(1, target.clamp_min(0), product)
    return torch.where(gated, z, h)


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value)) if value >= 0 else math.exp(value) / (1.0 + math.exp(value))
