"""NPFT's noise and its positions against slow oracles, and the theory they stand on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metier.specializers.methods.npft.noise import quantiser_step, range_noise, sensitive_positions, step_noise
from metier.specializers.training.weight_swap import with_entries, with_values


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratic(size: int) -> torch.Tensor:
    root = torch.randn(size, size, generator=seeded(), dtype=torch.float64)
    return root @ root.T / size


@pytest.mark.parametrize("shared", [False, True])
def test_independent_noise_measures_the_trace_and_shared_noise_does_not(shared: bool) -> None:
    size, bits = 32, 4
    hessian = quadratic(size)
    weight = torch.randn(1, size, generator=seeded(1), dtype=torch.float64)
    step = quantiser_step(weight, bits=bits).item()
    positions, generator = torch.arange(size), seeded(2)
    total, draws = 0.0, 20_000
    for _ in range(draws):
        noise = step_noise(weight, positions, bits=bits, generator=generator)
        noise = noise[:1].expand(size) if shared else noise
        total += 0.5 * (noise @ hessian @ noise).item()  # at the minimum the gradient is zero
    trace, ones = hessian.trace().item(), hessian.sum().item()
    expected = ones if shared else trace
    assert total / draws == pytest.approx(step**2 / 24 * expected, rel=0.03)
    assert abs(ones / trace - 1) > 0.08  # the two are told apart


@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.floats(0, 100),
    st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=54, max_size=54),
)
def test_exactly_the_largest_scores_are_chosen(rows: int, columns: int, percent: float, pool: list[float]) -> None:
    fisher = torch.tensor(pool[: rows * columns]).view(rows, columns)
    count = int(rows * columns * percent / 100)
    found = sensitive_positions(fisher, percent).tolist()
    # the oracle: Python's sort is stable, so of equal scores the first are taken
    order = sorted(range(rows * columns), key=lambda i: -fisher.flatten()[i].item())
    assert found == sorted(order[:count])


def test_no_weights_or_all_of_them() -> None:
    fisher = torch.rand(4, 5, generator=seeded())
    assert sensitive_positions(fisher, 0.0).numel() == 0
    assert sensitive_positions(fisher, 100.0).tolist() == list(range(20))
    weight = torch.randn(4, 5)
    nothing = torch.empty(0, dtype=torch.int64)
    assert range_noise(weight, nothing, generator=seeded()).numel() == 0
    assert step_noise(weight, nothing, bits=4, generator=seeded()).numel() == 0


def test_range_noise_is_drawn_per_channel_and_has_no_mean() -> None:
    weight = torch.randn(6, 40, generator=seeded(), dtype=torch.float64)
    positions = sensitive_positions(torch.rand(6, 40, generator=seeded(1)), 30.0)
    generator = seeded(2)
    noise = range_noise(weight, positions, generator=generator)
    uniform = torch.rand(positions.shape, generator=seeded(2)).double()
    for row in range(6):  # the oracle: one channel at a time
        mine = [i for i, at in enumerate(positions.tolist()) if at // 40 == row]
        if not mine:
            continue
        values = [weight.flatten()[positions[i]].item() for i in mine]
        low, high = min(values), max(values)
        drawn = [low + (high - low) * uniform[i].item() for i in mine]
        mean = sum(drawn) / len(drawn)
        assert noise[mine].tolist() == pytest.approx([d - mean for d in drawn], abs=1e-12)
        assert noise[mine].abs().max() <= high - low
        assert abs(noise[mine].sum().item()) < 1e-12


def test_a_channel_with_one_sensitive_weight() -> None:
    weight = torch.tensor([[0.7, -0.2, 0.1], [0.3, 0.9, -0.5]])
    positions = torch.tensor([0, 4, 5])
    by_range = range_noise(weight, positions, generator=seeded())
    assert by_range[0] == 0.0 and by_range[1] != 0.0
    by_step = step_noise(weight, positions, bits=4, generator=seeded())
    assert (by_step != 0.0).all()


@pytest.mark.parametrize("group_size", [None, 4])
def test_step_noise_stays_within_half_a_step(group_size: int | None) -> None:
    weight = torch.randn(5, 12, generator=seeded())
    noise = step_noise(weight, torch.arange(60), bits=3, group_size=group_size, generator=seeded(1)).view(5, 12)
    size = group_size or 12
    for row in range(5):
        for start in range(0, 12, size):
            step = weight[row, start : start + size].abs().max() / 3
            assert noise[row, start : start + size].abs().max() <= step / 2
            assert noise[row, start : start + size].abs().max() > step / 8


def test_noise_is_seeded() -> None:
    weight, positions = torch.randn(5, 12), torch.arange(0, 60, 3)
    assert torch.equal(*(range_noise(weight, positions, generator=seeded(3)) for _ in range(2)))
    assert not torch.equal(*(range_noise(weight, positions, generator=seeded(s)) for s in (3, 4)))


def test_noise_is_nowhere_else_and_weights_come_back_bit_for_bit() -> None:
    weight = torch.randn(5, 12, generator=seeded())
    before = weight.clone()
    positions = torch.tensor([1, 17, 59])
    with with_entries({"w": weight}, {"w": positions}, {"w": torch.tensor([0.1, 1e-9, 3.0])}):
        changed = (weight != before).flatten().nonzero().flatten().tolist()
        assert set(changed) <= {1, 17, 59} and 59 in changed
    assert torch.equal(weight, before)
    with pytest.raises(ZeroDivisionError), with_entries({"w": weight}, {"w": positions}, {"w": torch.ones(3)}):
        raise ZeroDivisionError
    assert torch.equal(weight, before)


def test_whole_matrices_come_back_bit_for_bit() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4, generator=seeded()))
    before = weight.detach().clone()
    with with_values({"w": weight}, [("w", torch.zeros(3, 4))]):
        (weight * torch.arange(12.0).view(3, 4)).sum().backward()
        assert torch.equal(weight.detach(), torch.zeros(3, 4))
    assert torch.equal(weight.detach(), before)
    assert weight.grad is not None and torch.equal(weight.grad, torch.arange(12.0).view(3, 4))
