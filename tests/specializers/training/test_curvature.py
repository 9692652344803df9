"""Squared gradients and Hessian traces against what can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from metier.specializers.training.curvature import fisher_diagonals, fisher_traces, hutchinson_traces


def test_the_fisher_of_a_softmax_is_the_sum_of_squared_gradients() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 3, dtype=torch.float64)
    inputs, labels = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 5, (7,))
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for x, label in zip(inputs, labels, strict=True):  # the oracle: (softmax - one hot) outer x, squared
        error = torch.softmax(weight @ x, 0)
        error[label] -= 1
        expected += torch.outer(error, x) ** 2

    def loss_of(i: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((weight @ inputs[i])[None], labels[i : i + 1])

    found = fisher_diagonals({"w": weight}, [lambda i=i: loss_of(i) for i in range(7)])  # type: ignore[misc]
    assert torch.allclose(found["w"].double(), expected, rtol=1e-5)
    assert not weight.requires_grad and weight.grad is None  # a frozen weight stays frozen


def test_gradients_of_opposite_samples_do_not_cancel() -> None:
    weight = torch.ones(1, 1)
    found = fisher_diagonals({"w": weight}, [lambda: (3 * weight).sum(), lambda: (-3 * weight).sum()])
    assert found["w"].item() == 18.0


def test_a_fisher_trace_is_the_sum_of_the_diagonal() -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(4, 3), "b": torch.randn(2, 4)}
    samples = torch.randn(5, 3)
    losses = [lambda x=x: (weights["b"] @ torch.tanh(weights["a"] @ x)).square().sum() for x in samples]  # type: ignore[misc]
    diagonals = fisher_diagonals(weights, losses)
    found = fisher_traces(weights, losses)
    assert found == pytest.approx({name: diagonal.sum().item() for name, diagonal in diagonals.items()})


def test_other_gradients_are_left_alone() -> None:
    weight, other = torch.ones(2, 2), torch.ones(2, requires_grad=True)
    weight.requires_grad_(True)
    (weight * 2).sum().backward()
    other.grad = torch.full((2,), 5.0)
    fisher_diagonals({"w": weight}, [lambda: (weight @ other).sum()])
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((2, 2), 2.0))
    assert torch.equal(other.grad, torch.full((2,), 5.0))


def test_a_weight_used_twice_counts_its_whole_gradient() -> None:
    weight = torch.ones(1, 1)
    found = fisher_diagonals({"w": weight}, [lambda: (weight * 2 + weight * 3).sum()])
    assert found["w"].item() == 25.0


def test_small_increments_are_not_lost_in_bfloat16() -> None:
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    found = fisher_diagonals({"w": weight}, [lambda: weight.sum()] * 1000)
    assert found["w"].item() == 1000.0  # bfloat16 stops at 256


def test_hutchinson_matches_the_exact_trace_of_a_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    first, second = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)

    def loss() -> torch.Tensor:
        point = torch.cat([first.flatten(), second])
        return 0.5 * point @ hessian @ point

    probes = 4000
    found = hutchinson_traces({"a": first, "b": second}, loss, probes=probes, generator=generator)
    for name, part in (("a", slice(0, 6)), ("b", slice(6, 12))):
        exact = hessian[part, part].trace().item()
        # Variance of one probe: 2 (off-diagonal of the own block)² + (coupling with the other block)².
        own, rows = hessian[part, part], hessian[part]
        off = (own - torch.diag(own.diagonal())).square().sum() * 2
        coupling = rows.square().sum() - own.square().sum()
        error = ((off + coupling) / probes).sqrt().item()
        assert found[name] == pytest.approx(exact, abs=4 * error)
        assert error < 0.05 * exact
