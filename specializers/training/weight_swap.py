"""Other weights for a while: what a step computes with, while what is trained or frozen stays bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["with_entries", "with_values"]


@contextmanager
def with_values(weights: Mapping[str, torch.Tensor], values: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
    """Let `weights` hold `values` (name and tensor); the originals come back bit-exactly, whatever happens inside.

    Values are taken one at a time, each before its weight changes, so that they may be computed on the way.
    Backward passes must run inside: autograd refuses to go back through weights that changed since.
    """
    import torch

    originals: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, value in values:
                originals[name] = weights[name].detach().clone()
                weights[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, original in originals.items():
                weights[name].copy_(original)


@contextmanager
def with_entries(
    weights: Mapping[str, torch.Tensor],
    positions: Mapping[str, torch.Tensor],
    added: Mapping[str, torch.Tensor],
) -> Iterator[None]:
    """Add `added` to the entries at `positions` (flat, unique) of `weights`; they come back bit-exactly."""
    import torch

    originals: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, weight in weights.items():
            originals[name] = weight.detach().view(-1)[positions[name]].clone()
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.view(-1)[positions[name]] = originals[name] + added[name]
        yield
    finally:
        with torch.no_grad():
            for name, original in originals.items():
                weights[name].view(-1)[positions[name]] = original
