"""MSQ's maths: a quantiser whose grids nest, the distance to the grid of fewer bits, and what it costs to drop a bit.

Tensors in, tensors out. Source: MSQ: Memory-Efficient Bit Sparsification Quantization, ICCV 2025, arXiv 2507.22349.
Choices the paper leaves open: codes are sign and magnitude, so that zero stays zero and "lowest bit zero" means the
same on both sides; |w| is mapped to [0, 1] by a scale that is frozen when training starts; and codes are divided by
2^m, not 2^m - 1, so that dropping a bit that is zero everywhere changes nothing.

`weight` is [d_out, d_in] and `scale` [d_out, groups] the magnitude that maps to 1. `bits` count the sign: m = bits - 1.
"""

from __future__ import annotations

import torch

__all__ = [
    "codes_to_values",
    "freeze_scale",
    "inside_range",
    "lsb_distance",
    "lsb_penalty",
    "lsb_residual",
    "nonzero_share",
    "round_clamp",
    "spread_scale",
    "step_size",
    "to_codes",
    "to_values",
]

# A row of zeros needs some scale that is a normal number also in half precision.
SMALLEST_SCALE = 1e-6


def round_clamp(magnitude: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of magnitudes in [0, 1]: min(round(2^bits · x), 2^bits - 1), ties to even, in the dtype given.

    The boundary between two codes of bits - 1 bits is the centre of an odd code of `bits` bits, so that a weight
    with its lowest bit set may go up or down to clear it. `bits` are magnitude bits here.
    """
    return (magnitude * 2**bits).round().clamp(max=2**bits - 1)


def freeze_scale(weight: torch.Tensor, *, group_size: int | None = None, clip: float = 1.0) -> torch.Tensor:
    """Scales [d_out, groups], float32: the largest magnitude of a row, or of `group_size` neighbours, times `clip`.

    Rounded to bfloat16, the type they are stored in: halving one is then exact, and so is the export.
    """
    largest = weight.detach().unflatten(1, (-1, group_size or weight.shape[1])).abs().amax(-1)
    return (largest.float() * clip).clamp_min(SMALLEST_SCALE).to(torch.bfloat16).float()


def step_size(scale: torch.Tensor, bits: int) -> torch.Tensor:
    """What one code is worth, [d_out, groups]: scale / 2^(bits - 1)."""
    return scale / 2 ** (bits - 1)


def to_codes(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes -(2^m - 1) … 2^m - 1 as int8 [d_out, d_in]; `bits` is 2 to 8."""
    return _codes(weight, scale, bits).to(torch.int8)


def codes_to_values(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights that codes stand for, [d_out, d_in]."""
    spread = spread_scale(step_size(scale, bits), codes)
    return codes.to(spread.dtype) * spread


def to_values(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights rounded to `bits`: W_n, in float32 (float64 for float64)."""
    return codes_to_values(_codes(weight, scale, bits), scale.to(_wide(weight)), bits)


def inside_range(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Where the straight-through gradient passes: |w| within its scale, bool [d_out, d_in]."""
    return weight.detach().abs() <= spread_scale(scale, weight)


def lsb_residual(weight: torch.Tensor, scale: torch.Tensor, bits: int, drop: int) -> torch.Tensor:
    """What the lowest `drop` bits hold: q_n - 2^drop · q_(n-drop), of magnitudes; 0 where dropping them is free."""
    magnitude = weight.detach().abs() / spread_scale(scale, weight)
    return round_clamp(magnitude, bits - 1) - 2**drop * round_clamp(magnitude, bits - 1 - drop)


def nonzero_share(weight: torch.Tensor, scale: torch.Tensor, bits: int, drop: int) -> float:
    """Share of the weights whose lowest `drop` bits are not zero (β of the paper).

    The top code is left out: it is odd and has no code above it, so the weights that set the scale would always count.
    """
    top = _codes(weight, scale, bits).abs() == 2 ** (bits - 1) - 1
    left = (lsb_residual(weight, scale, bits, drop) != 0) & ~top
    return float(left.sum().item() / max(1, top.numel() - int(top.sum())))


def lsb_distance(weight: torch.Tensor, scale: torch.Tensor, bits: int, drop: int) -> torch.Tensor:
    """Signed distance of each weight to its value with `drop` bits fewer: B = w - W_(n-drop)."""
    return weight.detach() - to_values(weight, scale, bits - drop).to(weight.dtype)


def lsb_penalty(weight: torch.Tensor, scale: torch.Tensor, bits: int, drop: int) -> torch.Tensor:
    """R = Σ |w - W_(n-drop)|, a scalar; the grid counts as constant, so its gradient is the distance's sign."""
    return (weight - to_values(weight, scale, bits - drop).detach().to(weight.dtype)).abs().sum()


def _codes(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    wide = weight.detach().to(_wide(weight))
    return wide.sign() * round_clamp(wide.abs() / spread_scale(scale, wide).to(wide.dtype), bits - 1)


def _wide(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def spread_scale(per_group: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[d_out, groups] as something that broadcasts over [d_out, d_in]."""
    return per_group if per_group.shape[1] == 1 else per_group.repeat_interleave(like.shape[1] // per_group.shape[1], 1)
