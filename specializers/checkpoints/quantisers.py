"""Rounding weights to few bits: scales with clip search, round-to-nearest, and GPTQ, as functions of tensors.

All are symmetric: w ≈ scale · q with integer q in [-2^(bits-1), 2^(bits-1) - 1]. A scale belongs to one output row
(`group_size=None`, "per channel") or to `group_size` neighbouring inputs of a row. `scale_dtype` is the type in which
scales will be stored; they are rounded to it before any weight is, so that what is stored is what was optimised.
"""

from __future__ import annotations

import torch

__all__ = ["dequantise", "find_scales", "gptq", "hessian_error", "quantise", "round_activations", "round_to_nearest"]

# Candidates of the clip search, as shares of the largest magnitude; 1 first, so that ties keep the whole range.
CLIP_RATIOS = tuple(1.0 - 0.025 * step for step in range(17))
# A group of zeros needs some scale that is a normal number also in half precision.
SMALLEST_SCALE = 1e-6


def find_scales(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    clip_search: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Find the scales [rows, groups] (float32, representable in `scale_dtype`) for `weight` [rows, inputs].

    Without the search the largest magnitude is the largest integer. With it, each group takes the share of that
    range, of `CLIP_RATIOS`, with the smallest squared error: clipping a rare large weight lets the others be
    rounded finer.
    """
    groups = _grouped(weight.float(), group_size)
    largest = 2 ** (bits - 1) - 1
    widest = groups.abs().amax(-1)
    best, best_error = torch.empty_like(widest), torch.full_like(widest, float("inf"))
    for ratio in CLIP_RATIOS if clip_search else (1.0,):
        scale = (widest * (ratio / largest)).clamp_min(SMALLEST_SCALE).to(scale_dtype).float()
        error = (_round(groups, scale[..., None], bits) * scale[..., None] - groups).square().sum(-1)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def quantise(weight: torch.Tensor, scale: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Round `weight` [rows, inputs] to the nearest integers, int8 of the same shape; `scale` is [rows, groups]."""
    group_size = weight.shape[1] // scale.shape[1]
    return _round(_grouped(weight.float(), group_size), scale[..., None], bits).view_as(weight).to(torch.int8)


def dequantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights [rows, inputs] in float32 that integers and scales [rows, groups] stand for."""
    return (_grouped(values.float(), values.shape[1] // scale.shape[1]) * scale.float()[..., None]).view_as(values)


def round_activations(inputs: torch.Tensor) -> torch.Tensor:
    """Inputs [..., features] of a W8A8 layer as its kernel sees them: 8 bits, one scale per token, in float32."""
    scale = (inputs.float().abs().amax(-1, keepdim=True) / 127).clamp_min(SMALLEST_SCALE)
    return _round(inputs.float(), scale, 8) * scale


def round_to_nearest(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    clip_search: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise without data: int8 values [rows, inputs] and scales [rows, groups] in `scale_dtype`."""
    scale = find_scales(weight, bits=bits, group_size=group_size, clip_search=clip_search, scale_dtype=scale_dtype)
    return quantise(weight, scale, bits=bits), scale.to(scale_dtype)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    clip_search: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise so that the layer's outputs change least: each column's error is made good by the columns after it.

    `weight` is [rows, inputs], `hessian` Σ x xᵀ [inputs, inputs] over the layer's calibration inputs. `damping` is
    the share of the mean diagonal that is added to it. `block` columns are updated at a time, which changes speed
    only. Scales of groups are found when their first column's turn comes, on the weights as they then are.
    Returns int8 values [rows, inputs] and scales [rows, groups] in `scale_dtype`.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    Algorithm 1 (2210.17323). Raises: torch.linalg.LinAlgError when the damped Hessian is not positive definite.
    """
    columns = weight.shape[1]
    group = group_size or columns
    work = weight.float().clone()
    inverse = _inverse_factor(hessian, damping)
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], columns // group)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(weight.shape[0], end - start)
        for column in range(start, end):
            if column % group == 0:
                # What earlier blocks owe is in `work`; what earlier columns of this block owe is too (below).
                piece = work[:, column : column + group]
                if column + group > end:  # reaches into columns that this block has not been charged to yet
                    piece = piece.clone()
                    piece[:, end - column :] -= (
                        errors[:, : column - start] @ inverse[start:column, end : column + group]
                    )
                scales[:, column // group] = find_scales(
                    piece, bits=bits, clip_search=clip_search, scale_dtype=scale_dtype
                )[:, 0]
            scale = scales[:, column // group]
            rounded = _round(work[:, column], scale, bits)
            values[:, column] = rounded.to(torch.int8)
            error = (work[:, column] - rounded * scale) / inverse[column, column]
            work[:, column + 1 : end] -= error[:, None] * inverse[column, column + 1 : end]
            errors[:, column - start] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return values, scales.to(scale_dtype)


def hessian_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared change of a layer's outputs over its calibration inputs: tr(D H Dᵀ) with D the change of weights."""
    change = (rounded - weight.float()).double()
    return float(((change @ hessian.double()) * change).sum())


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor U of the inverse of the damped Hessian, H⁻¹ = Uᵀ U."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is never there: nothing to make good, nothing to take on
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _grouped(weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(rows, columns // (group_size or columns), group_size or columns)


def _round(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    largest = 2 ** (bits - 1) - 1
    return (weight / scale).round().clamp(-largest - 1, largest)
