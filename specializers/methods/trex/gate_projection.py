"""The fixed gate that stands best for one that moves with every token: a T-REX layer as a LoRA.

With its gate G held fixed, a T-REX layer is a LoRA: sigmoid(100 gamma) B G^T A x = B' A x, of rank r1. Which G is
best for some tokens is a least-squares question with a closed answer, since a layer's update is B z with
z = G(x)^T h and h = A x: the G that minimises the mean of |G^T h - z|^2 is E[h h^T]^-1 E[h z^T], and it is best for
every B. The mean of G(x) is the plainer choice, which does not see which h a gate meets.
"""

from __future__ import annotations

from typing import Literal

import torch

from ...adapters.trex_shape import SHARPNESS, TrexShape
from .layer import combine_experts

__all__ = ["GateMoments", "Projection", "frozen_factors"]

Projection = Literal["least_squares", "mean"]

# Of the mean square of h: far below what matters, and enough where h never moves in some direction.
_RIDGE = 1e-9


def frozen_factors(
    a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor, gamma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The LoRA halves (A [r1, d_in], B' [d_out, r1]) of a layer whose gate [r1·r2] is held fixed.

    B' = sigmoid(100 gamma) B G^T, so that B' A x is the layer's update exactly, for every x.
    """
    g = gate.unflatten(-1, (a.shape[0], b.shape[1])).to(b.dtype)
    return a, torch.sigmoid(SHARPNESS * gamma).to(b.dtype) * (b @ g.T)


class GateMoments:
    """Sums over tokens of what a layer's gate does, from which the best fixed gate follows."""

    def __init__(self, shape: TrexShape) -> None:
        self._shape = shape
        self._tokens = 0
        self._gate = torch.zeros(shape.experts, dtype=torch.float64)
        self._hh = torch.zeros(shape.r1, shape.r1, dtype=torch.float64)
        self._hz = torch.zeros(shape.r1, shape.r2, dtype=torch.float64)

    def add(self, h: torch.Tensor, gate: torch.Tensor) -> None:
        """Count tokens: h [tokens, r1] and their gates [tokens, r1·r2]."""
        h, gate = h.double(), gate.double()
        self._tokens += h.shape[0]
        self._gate += gate.sum(dim=0)
        self._hh += h.T @ h
        self._hz += h.T @ combine_experts(h, gate)

    def gate(self, projection: Projection) -> torch.Tensor:
        """The fixed gate [r1·r2] that stands for those counted."""
        if projection == "mean":
            return self._gate / self._tokens
        # Where h never moves in some direction any gate does; the smallest keeps the system solvable.
        ridge = _RIDGE * self._hh.diagonal().mean().clamp(min=1e-30) * torch.eye(self._shape.r1, dtype=torch.float64)
        return torch.linalg.solve(self._hh + ridge, self._hz).flatten()
