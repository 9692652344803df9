"""The quantisers against slow, obvious versions of themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.specializers.checkpoints.quantisers import (
    CLIP_RATIOS,
    dequantise,
    find_scales,
    gptq,
    hessian_error,
    quantise,
    round_to_nearest,
)


def random_weight(seed: int, rows: int = 6, columns: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * torch.rand(rows, 1, generator=generator) + (weight.abs() > 2.2) * weight * 3


def correlated_hessian(seed: int, columns: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    inputs = torch.randn(200, columns, generator=generator) @ mix
    return inputs.T @ inputs


def rounded_one(value: float, scale: float, bits: int) -> int:
    """Round one weight; ties go to the even integer, as in torch."""
    largest = 2 ** (bits - 1) - 1
    return max(-largest - 1, min(largest, round(value / scale)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([3, 4, 8]), group=st.sampled_from([None, 8, 16]))
def test_round_to_nearest_is_rounding_each_weight(seed: int, bits: int, group: int | None) -> None:
    weight = random_weight(seed)
    values, scale = round_to_nearest(weight, bits=bits, group_size=group)
    width = group or weight.shape[1]
    assert values.dtype == torch.int8 and scale.dtype == torch.bfloat16
    assert scale.shape == (6, 32 // width)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            step = float(scale[row, column // width])
            # Division in float32 there and in float64 here may fall on different sides of a tie.
            exact = float(weight[row, column]) / step
            if abs(exact % 1 - 0.5) > 1e-5:
                assert int(values[row, column]) == rounded_one(float(weight[row, column]), step, bits)
    assert torch.equal(quantise(weight, scale.float(), bits=bits), values)
    # No weight is off by more than half a step (the scale itself was rounded: at most one part in 256).
    error = (dequantise(values, scale) - weight).abs().view(6, -1, width)
    assert bool((error <= scale.float()[..., None] * (0.5 + 2.0**bits / 512)).all())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([4, 8]), group=st.sampled_from([None, 8]))
def test_clip_search_takes_the_best_of_all_ratios(seed: int, bits: int, group: int | None) -> None:
    weight = random_weight(seed, rows=3)
    width = group or weight.shape[1]
    found = find_scales(weight, bits=bits, group_size=group, clip_search=True)
    for row in range(3):
        for g in range(weight.shape[1] // width):
            piece = weight[row, g * width : (g + 1) * width]
            widest = float(piece.abs().max())
            errors = {}
            for ratio in CLIP_RATIOS:
                scale = float(torch.tensor(widest * ratio / (2 ** (bits - 1) - 1)).bfloat16())
                errors[scale] = sum((rounded_one(float(w), scale, bits) * scale - float(w)) ** 2 for w in piece)
            assert errors[float(found[row, g])] <= min(errors.values()) * (1 + 1e-3) + 1e-9


def obvious_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, damping: float) -> torch.Tensor:
    """Optimal brain quantisation, column by column: the inverse of what is left is computed anew each time."""
    work, damped = weight.double().clone(), hessian.double().clone()
    damped += torch.eye(len(damped)) * damping * damped.diagonal().mean()
    values = torch.zeros_like(weight, dtype=torch.int8)
    for column in range(weight.shape[1]):
        if column % group == 0:
            scale = find_scales(work[:, column : column + group].float(), bits=bits, scale_dtype=torch.float32)
        inverse = torch.linalg.inv(damped[column:, column:])
        for row in range(weight.shape[0]):
            value = rounded_one(float(work[row, column]), float(scale[row, 0]), bits)
            values[row, column] = value
            error = (work[row, column] - value * float(scale[row, 0])) / inverse[0, 0]
            work[row, column:] -= error * inverse[0]
    return values


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8), (4, 16)])
def test_gptq_is_optimal_brain_quantisation(seed: int, bits: int, group: int | None) -> None:
    weight, hessian = random_weight(seed), correlated_hessian(seed)
    expected = obvious_gptq(weight, hessian, bits, group or 32, damping=0.01)
    for block in (5, 12, 32):  # blocks that end inside groups, at their ends, and none
        values, _ = gptq(weight, hessian, bits=bits, group_size=group, scale_dtype=torch.float32, block=block)
        # float32 sums may tip a tie; one tipped weight may tip others of its row.
        assert (values != expected).sum() <= 2, block


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_changes_outputs_less_than_rounding(bits: int) -> None:
    tuned_error, plain_error = 0.0, 0.0
    for seed in range(12):  # greedy, so better as a rule and not each time
        weight, hessian = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)), correlated_hessian(seed)
        tuned = dequantise(*gptq(weight, hessian, bits=bits, group_size=16, clip_search=True))
        plain = dequantise(*round_to_nearest(weight, bits=bits, group_size=16, clip_search=True))
        tuned_error += hessian_error(weight, tuned, hessian)
        plain_error += hessian_error(weight, plain, hessian)
    assert tuned_error < 0.6 * plain_error


def test_hessian_error_is_the_change_of_the_outputs() -> None:
    weight, inputs = random_weight(3), torch.randn(50, 32)
    rounded = dequantise(*round_to_nearest(weight, bits=4))
    change = (inputs @ rounded.T - inputs @ weight.T).square().sum()
    assert hessian_error(weight, rounded, inputs.T @ inputs) == pytest.approx(float(change), rel=1e-4)


def test_inputs_that_are_never_there_are_simply_rounded() -> None:
    weight, hessian = random_weight(5), correlated_hessian(5)
    hessian[7], hessian[:, 7] = 0, 0
    values, scale = gptq(weight, hessian, bits=8)
    assert torch.equal(values[:, 7], quantise(weight, scale.float(), bits=8)[:, 7])


def test_a_row_of_zeros_stays_zero() -> None:
    weight = random_weight(1)
    weight[2] = 0
    for options in ({"bits": 4, "group_size": 8, "clip_search": True}, {"bits": 8}):
        values, scale = round_to_nearest(weight, **options)  # type: ignore[arg-type]
        assert not values[2].any() and bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
