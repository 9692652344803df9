"""How far a stand-in for a model is from it, by their logits on the same tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["LogitError", "LogitErrorMeter"]

# An adapter that moves logits by less than this on average does nothing that could be lost.
_LEAST_EFFECT = 1e-3


@dataclass(frozen=True)
class LogitError:
    """What a stand-in loses, over `tokens` positions.

    `share` is its mean |d logit| against the original as a share of what the original itself changes in the bare
    base's logits: 0 is the original, 1 is as far away as having no adapter. `kl_nats` is KL(original ‖ stand-in)
    per token, `base_kl_nats` the same with the bare base as stand-in; `agreement` is the share of positions at
    which both like the same token best.
    """

    tokens: int
    max_logit: float
    mean_logit: float
    share: float
    kl_nats: float
    base_kl_nats: float
    agreement: float

    def as_card(self) -> dict[str, Any]:
        """The same for a variant's card, rounded to four digits."""
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of what the adapter changes in the logits (max {self.max_logit:.2g}), "
            f"KL {self.kl_nats:.3g} nats a token (no adapter: {self.base_kl_nats:.3g}), "
            f"same best token at {self.agreement:.1%} of {self.tokens} positions"
        )


class LogitErrorMeter:
    """Adds up the error over batches, so that no more than one batch of logits is ever held."""

    def __init__(self) -> None:
        self._tokens = 0
        self._values = 0
        self._max = 0.0
        self._error = self._effect = self._kl = self._base_kl = self._agreed = 0.0

    def add(self, original: torch.Tensor, stand_in: torch.Tensor, base: torch.Tensor) -> None:
        """Count logits [positions, vocabulary] of the original, of its stand-in, and of the bare base."""
        original, stand_in, base = original.double(), stand_in.double(), base.double()
        difference = (stand_in - original).abs()
        self._tokens += original.shape[0]
        self._values += original.numel()
        self._max = max(self._max, float(difference.max()))
        self._error += float(difference.sum())
        self._effect += float((original - base).abs().sum())
        log_p = torch.log_softmax(original, dim=-1)
        self._kl += _kl_sum(log_p, stand_in)
        self._base_kl += _kl_sum(log_p, base)
        self._agreed += float((original.argmax(dim=-1) == stand_in.argmax(dim=-1)).sum())

    def result(self) -> LogitError:
        """The error over all that was added, which must be at least one position."""
        error, effect = self._error / self._values, self._effect / self._values
        return LogitError(
            tokens=self._tokens,
            max_logit=self._max,
            mean_logit=error,
            share=error / max(effect, _LEAST_EFFECT),
            kl_nats=self._kl / self._tokens,
            base_kl_nats=self._base_kl / self._tokens,
            agreement=self._agreed / self._tokens,
        )


def _kl_sum(log_p: torch.Tensor, logits: torch.Tensor) -> float:
    """Sum over positions of KL(p ‖ softmax(logits)) in nats; rounding may leave a sum of equals below 0."""
    divergence = (log_p.exp() * (log_p - torch.log_softmax(logits, dim=-1))).sum()
    return max(0.0, float(divergence))
