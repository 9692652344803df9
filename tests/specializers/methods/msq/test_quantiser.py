"""MSQ's quantiser: exact codes, nested grids, and a penalty that clears the lowest bits."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.specializers.methods.msq.quantiser import (
    codes_to_values,
    freeze_scale,
    inside_range,
    lsb_distance,
    lsb_penalty,
    lsb_residual,
    nonzero_share,
    round_clamp,
    step_size,
    to_codes,
    to_values,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


ONE = torch.ones(1, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("bits", "magnitudes", "codes"),
    [
        (2, [0, 0.12, 0.125, 0.13, 0.25, 0.375, 0.5, 0.625, 0.75, 0.9, 1], [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]),
        (3, [0, 0.0625, 0.07, 0.1875, 0.5, 0.8125, 0.875, 0.94, 1], [0, 0, 1, 2, 4, 6, 7, 7, 7]),
        (4, [0, 0.03125, 0.04, 0.09375, 0.5, 0.9375, 0.97, 1], [0, 0, 1, 2, 8, 15, 15, 15]),
    ],
)
def test_codes_with_ties_and_the_clamp(bits: int, magnitudes: list[float], codes: list[int]) -> None:
    assert round_clamp(torch.tensor(magnitudes, dtype=torch.float64), bits).tolist() == codes


@given(st.integers(2, 8), st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=12), st.floats(0.01, 9))
def test_codes_against_a_plain_loop(bits: int, weights: list[float], scale: float) -> None:
    found = to_codes(one_row(*weights), ONE * scale, bits)
    levels = 2 ** (bits - 1)
    for weight, code in zip(weights, found[0].tolist(), strict=True):
        expected = min(round(abs(weight) / scale * levels), levels - 1)  # Python rounds ties to even too
        assert code == (expected if weight > 0 else -expected)
    values = codes_to_values(found, ONE * scale, bits)
    assert values[0].tolist() == pytest.approx([code * scale / levels for code in found[0].tolist()])


@given(st.integers(2, 8), st.integers(0, 1000))
def test_rounding_twice_is_rounding_once_and_zero_stays_zero(bits: int, seed: int) -> None:
    weight = torch.randn(3, 8, generator=seeded(seed))
    weight[0, 0] = 0.0
    scale = freeze_scale(weight)
    once = to_values(weight, scale, bits)
    assert torch.equal(to_values(once, scale, bits), once)
    assert once[0, 0] == 0.0
    within = inside_range(weight, scale) & (to_codes(weight, scale, bits).abs() < 2 ** (bits - 1) - 1)
    assert ((once - weight).abs() <= step_size(scale, bits) / 2 * (1 + 1e-6))[within].all()


def boundaries(levels: int, factor: int) -> list[Fraction]:
    """Where round(factor · x) steps from one code to the next, for codes 0 … levels - 1."""
    return [Fraction(2 * code - 1, 2 * factor) for code in range(1, levels)]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_coarse_boundaries_are_the_centres_of_odd_fine_bins(bits: int) -> None:
    centres = [Fraction(code, 2**bits) for code in range(1, 2**bits, 2)]
    coarse = boundaries(2 ** (bits - 1), 2 ** (bits - 1))
    assert all(boundary in centres for boundary in coarse)
    for boundary in coarse:  # the quantiser itself steps there
        below = torch.tensor(float(boundary) - 1e-9, dtype=torch.float64)
        above = torch.tensor(float(boundary) + 1e-9, dtype=torch.float64)
        assert round_clamp(above, bits - 1) - round_clamp(below, bits - 1) == 1
        assert round_clamp(below, bits) % 2 == 1 and round_clamp(below, bits) == round_clamp(above, bits)
    dorefa = boundaries(2 ** (bits - 1), 2 ** (bits - 1) - 1)
    assert not any(boundary in [Fraction(c, 2**bits - 1) for c in range(1, 2**bits, 2)] for boundary in dorefa[1:-1])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_residual_is_zero_exactly_where_the_low_bits_are(bits: int) -> None:
    weight = torch.rand(1, 200_000, generator=seeded(), dtype=torch.float64) * 2 - 1
    codes = to_codes(weight, ONE, bits).abs().int()
    one = lsb_residual(weight, ONE, bits, 1)
    assert set(one.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(one == 0, codes % 2 == 0)
    if bits > 3:
        two = lsb_residual(weight, ONE, bits, 2)
        below_the_clamp = codes < 2 ** (bits - 1) - 2
        assert torch.equal((two == 0)[below_the_clamp], (codes % 4 == 0)[below_the_clamp])


def test_the_penalty_pulls_to_the_nearest_coarse_value_from_both_sides() -> None:
    bits = 4  # three magnitude bits: steps of 1/8, without the last of 1/4
    weight = one_row(0.40, 0.36, -0.40, -0.36, 0.27).requires_grad_()
    lsb_penalty(weight, ONE, bits, 1).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[-1, 1, 1, -1, 1]]  # odd code 3 lies between 0.25 and 0.5: both signs occur
    nearest = torch.round(weight.detach() * 4) / 4  # the oracle
    assert torch.equal(torch.sign(weight.detach() - nearest), weight.grad)
    assert torch.equal(lsb_distance(weight, ONE, bits, 1).sign(), weight.grad)


@pytest.mark.parametrize("drop", [1, 2])
def test_descending_on_the_penalty_alone_clears_the_low_bits(drop: int) -> None:
    weight = torch.randn(4, 64, generator=seeded(), dtype=torch.float64).requires_grad_()
    scale, bits = freeze_scale(weight).double(), 5
    before = nonzero_share(weight, scale, bits, drop)
    assert before > 0.4
    for _ in range(400):
        lsb_penalty(weight, scale, bits, drop).backward()
        with torch.no_grad():
            assert weight.grad is not None
            weight -= 0.002 * weight.grad
            weight.grad = None
    assert nonzero_share(weight, scale, bits, drop) == 0.0


def test_the_share_of_nonzero_bits_leaves_the_top_code_out() -> None:
    weight = one_row(1.0, 0.875, 0.125, 0.25, 0.5, 0.0)  # codes 7 (clamped), 7, 1, 2, 4, 0 of 8
    assert to_codes(weight, ONE, 4)[0].tolist() == [7, 7, 1, 2, 4, 0]
    assert nonzero_share(weight, ONE, 4, 1) == 1 / 4
    assert nonzero_share(one_row(1.0), ONE, 4, 1) == 0.0


@given(st.integers(3, 8), st.integers(0, 100))
def test_dropping_a_clear_bit_changes_no_output(bits: int, seed: int) -> None:
    even = torch.randint(-(2 ** (bits - 2)) + 1, 2 ** (bits - 2), (5, 16), generator=seeded(seed)) * 2
    scale = freeze_scale(torch.randn(5, 16, generator=seeded(seed + 1)))
    weight = codes_to_values(even, scale, bits)
    inputs = torch.randn(3, 16, generator=seeded(seed + 2))
    assert nonzero_share(weight, scale, bits, 1) == 0.0
    full, cut = to_values(weight, scale, bits), to_values(weight, scale, bits - 1)
    assert torch.equal(inputs @ full.T, inputs @ cut.T)
    # With 2^m - 1 below the codes, as some texts have it, the same cut scales every weight.
    of = even.double() / (2 ** (bits - 1) - 1)
    after = (even.double() / 2) / (2 ** (bits - 2) - 1)
    factor = (2 ** (bits - 1) - 1) / (2 ** (bits - 1) - 2)
    assert torch.allclose(after, of * factor)


def test_groups_have_scales_of_their_own() -> None:
    weight = torch.randn(3, 8, generator=seeded())
    scale = freeze_scale(weight, group_size=4)
    found = to_values(weight, scale, 4)
    for row in range(3):
        for group in range(2):
            part = weight[row : row + 1, group * 4 : group * 4 + 4]
            own = scale[row : row + 1, group : group + 1]
            assert own.item() == part.abs().max().to(torch.bfloat16).item()
            assert torch.equal(found[row, group * 4 : group * 4 + 4], to_values(part, own, 4)[0])


def test_the_gradient_passes_inside_the_range_only() -> None:
    weight = one_row(-1.2, -1.0, 0.3, 1.0, 1.01)
    assert inside_range(weight, ONE).tolist() == [[False, True, True, True, False]]


def test_a_row_of_zeros_stays_one() -> None:
    weight = torch.zeros(1, 4)
    assert torch.equal(to_values(weight, freeze_scale(weight), 4), weight)
