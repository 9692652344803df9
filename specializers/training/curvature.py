"""How sharply a loss bends at each weight: squared gradients (diagonal Fisher) and Hessian traces (Hutchinson).

NPFT chooses the weights it perturbs by squared gradients, MSQ the layers that may lose bits by their sums or by traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["fisher_diagonals", "fisher_traces", "hutchinson_traces"]


def fisher_diagonals(
    weights: Mapping[str, torch.Tensor], losses: Iterable[Callable[[], torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Diagonal of the empirical Fisher: for each weight the sum over samples of its squared gradient, float32.

    Each of `losses` computes the loss of ONE sample: squares are summed, not gradients, which would cancel.
    Gradients of other parameters are left as they are, and `weights` may be frozen. NPFT, section 3.2.
    """
    import torch

    total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    _per_sample(weights, losses, lambda name, gradient: total[name].addcmul_(gradient, gradient))
    return total


def fisher_traces(
    weights: Mapping[str, torch.Tensor], losses: Iterable[Callable[[], torch.Tensor]]
) -> dict[str, float]:
    """The trace of each weight's empirical Fisher: the sum over samples and entries of its squared gradient.

    Each of `losses` computes the loss of ONE sample. For a model that fits its data the Fisher is close to
    the Hessian; unlike a Hessian's estimate it is never negative, and needs first derivatives only.
    """
    total = dict.fromkeys(weights, 0.0)

    def add(name: str, gradient: torch.Tensor) -> None:
        total[name] += gradient.square().sum().item()

    _per_sample(weights, losses, add)
    return total


def hutchinson_traces(
    weights: Mapping[str, torch.Tensor],
    loss: Callable[[], torch.Tensor],
    *,
    probes: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Estimate the trace of each weight's own block of the Hessian of `loss`.

    The mean over `probes` of v'Hv with v of independent signs: unbiased, also per block when all are probed at once,
    because signs of different blocks are independent. `loss` must allow a second derivative.
    """
    import torch

    traces = dict.fromkeys(weights, 0.0)
    with _differentiable(weights):
        inputs = list(weights.values())
        gradients = torch.autograd.grad(loss(), inputs, create_graph=True)
        for _ in range(probes):
            signs = [
                torch.randint(0, 2, w.shape, generator=generator).to(w.device, w.dtype).mul_(2).sub_(1) for w in inputs
            ]
            products = torch.autograd.grad(gradients, inputs, grad_outputs=signs, retain_graph=True)
            for name, sign, product in zip(weights, signs, products, strict=True):
                traces[name] += (sign * product).sum().item() / probes
    return traces


def _per_sample(
    weights: Mapping[str, torch.Tensor],
    losses: Iterable[Callable[[], torch.Tensor]],
    take: Callable[[str, torch.Tensor], object],
) -> None:
    """Give `take` each weight's gradient, float32, of each loss: as it arrives, so that only one is in memory."""

    def taking(name: str) -> Callable[[torch.Tensor], None]:
        def hook(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            take(name, weight.grad.float())
            weight.grad = None

        return hook

    with _differentiable(weights):
        hooks = [weight.register_post_accumulate_grad_hook(taking(name)) for name, weight in weights.items()]
        try:
            for loss in losses:
                loss().backward(inputs=list(weights.values()))
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _differentiable(weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let frozen weights have gradients for a while; those they have are put aside, and come back."""
    before = {name: (weight.requires_grad, weight.grad) for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        yield
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name][0])
            weight.grad = before[name][1]
