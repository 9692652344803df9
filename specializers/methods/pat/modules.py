"""PAT's parts: the shared channel mask, its soft-to-hard schedule, the hybrid sparsification operator, the losses.

Source: "Pruning-Aware Tuning" (arXiv 2408.14721) and its released code. Where the two differ, the code is followed
for what it says (scale per output channel, both mask losses) and the paper where the code has a slip (the identity
loss covers every operator). An operator sits behind the embedding and behind both outputs of each block,

    z = v * m * (u + (u L0^T) L1^T)        u [..., d], L0 [r, d], L1 [d, r], v [d], m [d]

so the residual stream is a sum of masked terms, and its dropped channels are zero from the first tensor on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

__all__ = [
    "ChannelMask",
    "SparsificationOperator",
    "active_loss",
    "decaying_mask",
    "hard_mask",
    "identity_loss",
    "keep_channels",
    "mask_offset",
    "mask_temperature",
    "ranked_proxies",
    "soft_mask",
    "sparsify",
]

FREEZE_SHARE = 0.8
"""From this share of the milestone on the temperature stays, and the task's gradient no longer reaches the mask."""

_START = 0.1


def mask_temperature(step: int, milestone: int) -> float:
    """tau(s) = 1 / (1 - ln(max(1, s)) / ln(s0) + 1e-6), kept from 0.8 s0 on (as released).

    `milestone` is s0, at least 2.
    """
    reached = max(1.0, min(float(step), FREEZE_SHARE * milestone))
    return 1.0 / (1.0 - math.log(reached) / math.log(milestone) + 1e-6)


def mask_offset(step: int, milestone: int) -> float:
    """beta(s) = max(0.5 - s / s0, 0): with it the mask is 1 everywhere at step 0."""
    return max(0.5 - step / milestone, 0.0)


def soft_mask(proxies: torch.Tensor, step: int, milestone: int) -> torch.Tensor:
    """m = sigmoid(tau * proxies) + beta, [d]; values lie in [0, 1] from half the milestone on.

    The released code caps the exponent at 10, so that dropped channels never fall below 4.5e-5; this does not.
    """
    if step >= FREEZE_SHARE * milestone:
        proxies = proxies.detach()
    return torch.sigmoid(mask_temperature(step, milestone) * proxies) + mask_offset(step, milestone)


def decaying_mask(kept: torch.Tensor, step: int, milestone: int) -> torch.Tensor:
    """The control's mask, [d]: 1 on the channels chosen beforehand (`kept`, bool), the rest falls to 0 linearly."""
    return torch.where(kept, 1.0, 1.0 - min(step / milestone, 1.0))


def keep_channels(proxies: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest proxies, ascending; among equals the first channels win, so the count is exact."""
    order = torch.argsort(proxies.detach(), descending=True, stable=True)
    return order[:count].sort().values


def hard_mask(proxies: torch.Tensor, count: int) -> torch.Tensor:
    """The mask in {0, 1} of exactly `count` ones, [d]."""
    mask = torch.zeros_like(proxies.detach())
    mask[keep_channels(proxies, count)] = 1.0
    return mask


def ranked_proxies(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Proxies [d] in [-0.1, 0.1] that are in the order of `importance`, with exactly `count` above zero.

    A start for the mask that is still undecided: the task can turn it round while it is soft.
    """
    ranks = torch.empty_like(importance)
    order = torch.argsort(importance, descending=True, stable=True)
    ranks[order] = torch.arange(len(importance), dtype=importance.dtype, device=importance.device)
    return _START * torch.where(
        ranks < count, (count - ranks) / count, (count - 1 - ranks) / max(1, len(importance) - count)
    )


def active_loss(proxies: torch.Tensor, count: int, *, ranked: bool = False) -> torch.Tensor:
    """10 * (|active - N| / N + mean over active of (p - 0.5)^2 + mean over the rest of (p + 0.5)^2), a scalar.

    The count of active channels passes its gradient straight to every proxy alike; the two means pull proxies to
    +-0.5, where the sigmoid saturates. A count that is too low can stay so, as released: while fewer than N channels
    are off, their pull to -0.5 is stronger than the count's push. With `ranked` the N largest are the ones pulled up,
    whatever their sign, which ends at the exact count.
    """
    on = hard_mask(proxies, count).bool() if ranked else proxies.detach() > 0
    step = (proxies.detach() >= 0).to(proxies.dtype)
    active = (step + proxies - proxies.detach()).sum()
    loss = (active - count).abs() / count
    for chosen, target in ((on, 0.5), (~on, -0.5)):
        if bool(chosen.any()):
            loss = loss + (proxies[chosen] - target).square().mean()
    return 10.0 * loss


def identity_loss(downs: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum over operators of the mean square of L0 L0^T - I, a scalar; zero when all rows of every L0 are orthonormal.

    Only L0: L1 starts at zero, so it can't be orthonormal and leave the model as it was (as released).
    """
    total = torch.zeros(())
    for down in downs:
        gram = down @ down.T
        total = total.to(gram) + (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().mean()
    return total


def sparsify(
    u: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """z = v * m * (u + (u L0^T) L1^T): mask after mixing, so that dropped channels' content can move to kept ones."""
    return scale * mask * (u + (u @ down.T) @ up.T)


class ChannelMask(nn.Module):  # type: ignore[misc]
    """The one mask of a network: which of d channels stay, from soft to hard.

    `count` channels stay. Until `harden_step` the mask is soft, by `milestone`'s schedule; from then on it is the
    exact hard one, in training too, so the rest of the tuning sees the model that will be merged. With `random` the
    channels are drawn beforehand and nothing about them is learned (the control).
    """

    def __init__(
        self,
        hidden_size: int,
        count: int,
        *,
        milestone: int,
        harden_step: int,
        channels: Literal["learned", "random"] = "learned",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.count = count
        self.milestone = milestone
        self.harden_step = harden_step
        self.learned = channels == "learned"
        self.step = 0
        proxies = torch.zeros(hidden_size)
        if not self.learned:
            chosen = torch.randperm(hidden_size, generator=torch.Generator().manual_seed(seed))[:count]
            proxies = torch.full((hidden_size,), -0.5)
            proxies[chosen] = 0.5
        self.proxies = nn.Parameter(proxies, requires_grad=self.learned)

    @property
    def hard(self) -> bool:
        return self.step >= self.harden_step

    def harden(self) -> None:
        """Make the mask hard for good, as the end of training does."""
        self.step = self.harden_step

    def keep(self) -> torch.Tensor:
        """Indices of the channels that stay, ascending, exactly `count`."""
        return keep_channels(self.proxies, self.count)

    def forward(self) -> torch.Tensor:
        """The mask at the current step, [d]."""
        if self.hard:
            return hard_mask(self.proxies, self.count)
        if self.learned:
            return soft_mask(self.proxies, self.step, self.milestone)
        return decaying_mask(self.proxies > 0, self.step, self.milestone)

    def loss(self) -> torch.Tensor:
        """`active_loss` while channels are being chosen, else zero; ranked once the task has no more say in it."""
        if self.hard or not self.learned:
            return torch.zeros((), device=self.proxies.device)
        return active_loss(self.proxies, self.count, ranked=self.step >= FREEZE_SHARE * self.milestone)


class SparsificationOperator(nn.Module):  # type: ignore[misc]
    """One hybrid sparsification module; with rank 0 it only masks (D = I, v = 1), which keeps a tied head tied.

    All operators of a network hold the same `mask`. L0 starts kaiming-uniform with a = sqrt(5), L1 at zero and v at
    one, so that at step 0 nothing is changed.
    """

    def __init__(self, mask: ChannelMask, rank: int) -> None:
        super().__init__()
        self.mask = mask
        self.rank = rank
        hidden_size = len(mask.proxies)
        if rank:
            self.down = nn.Parameter(torch.empty(rank, hidden_size))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            self.up = nn.Parameter(torch.zeros(hidden_size, rank))
            self.scale = nn.Parameter(torch.ones(hidden_size))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        mask = self.mask()
        if not self.rank:
            return mask * u
        return sparsify(u, self.down, self.up, self.scale, mask)

    def tensors(self) -> dict[str, Any]:
        """L0, L1 and v by name, nothing for an operator that only masks."""
        if not self.rank:
            return {}
        return {"down": self.down.detach(), "up": self.up.detach(), "scale": self.scale.detach()}
