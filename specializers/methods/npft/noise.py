"""NPFT's maths: which weights a quantiser hurts most, and the noise that stands for its rounding.

Tensors in, tensors out. Source: Noise Perturbation Fine-tuning for Robust LLM Quantization, CPAL 2025 (PMLR 280),
arXiv 2412.06858, sections 3.2 and 3.3. Positions are flat indices into a matrix [d_out, d_in], sorted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["quantiser_step", "range_noise", "sensitive_positions", "step_noise"]


def sensitive_positions(fisher: torch.Tensor, percent: float) -> torch.Tensor:
    """Choose the `percent` of a matrix's weights with the largest Fisher score.

    `fisher` is [d_out, d_in]. Exactly int(numel · percent / 100) positions, int64; of equal scores the first.
    """
    import torch

    scores = fisher.flatten()
    count = int(scores.numel() * percent / 100)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=fisher.device)
    threshold = torch.topk(scores, count).values[-1]
    above = torch.nonzero(scores > threshold).flatten()
    ties = torch.nonzero(scores == threshold).flatten()[: count - above.numel()]
    return torch.cat([above, ties]).sort().values


def range_noise(weight: torch.Tensor, positions: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Noise of the published algorithm (Alg. 1): per output channel uniform over its sensitive weights' range.

    U[min, max] of the channel's weights at `positions`, less the mean of what was drawn in that channel. A channel
    with one such weight gets exactly 0. Returns one value per position, in the weight's dtype.
    """
    import torch

    rows = positions // weight.shape[1]
    values = weight.detach().flatten()[positions]
    per_row = torch.zeros(weight.shape[0], dtype=values.dtype, device=values.device)
    low = per_row.scatter_reduce(0, rows, values, "amin", include_self=False)
    high = per_row.scatter_reduce(0, rows, values, "amax", include_self=False)
    drawn = low[rows] + (high - low)[rows] * _uniform(values, generator)
    mean = per_row.index_add(0, rows, drawn) / torch.bincount(rows, minlength=weight.shape[0]).clamp(min=1)
    return drawn - mean[rows]


def step_noise(
    weight: torch.Tensor,
    positions: torch.Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    generator: torch.Generator,
) -> torch.Tensor:
    """Noise of the theory (section 3.2): U[-Δ/2, Δ/2] with Δ the step the weight would be rounded to.

    Independent draws, so that the mean rise of the loss is Δ²/24 times the Hessian's trace over `positions`.
    """
    steps = quantiser_step(weight, bits=bits, group_size=group_size)
    columns = weight.shape[1]
    rows, groups = positions // columns, positions % columns // (columns // steps.shape[1])
    values = weight.detach().flatten()[positions]
    return (_uniform(values, generator) - 0.5) * steps[rows, groups]


def quantiser_step(weight: torch.Tensor, *, bits: int, group_size: int | None = None) -> torch.Tensor:
    """Step Δ of symmetric rounding without clipping, [d_out, groups]: largest magnitude over 2^(bits-1) - 1.

    `group_size` divides d_in; None is one step per output channel.
    """
    size = group_size or weight.shape[1]
    largest = weight.detach().unflatten(1, (-1, size)).abs().amax(-1)
    return largest / (2 ** (bits - 1) - 1)


def _uniform(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    import torch

    # Drawn on the CPU: the same noise on every device.
    return torch.rand(like.shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)
