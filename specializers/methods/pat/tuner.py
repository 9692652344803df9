"""A model with PAT's operators behind its embedding and outputs, and what its training descends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import torch
from torch import nn

from ...checkpoints.dense_checkpoint import dense_tensors, fold_adapters
from ...training.batches import EncodedRow
from ...training.objective import Objective, Placed
from .merge import EMBEDDING, OperatorTensors
from .modules import ChannelMask, SparsificationOperator, identity_loss

__all__ = ["PatModel", "PatObjective", "channel_importance", "operator_sites"]


def operator_sites(layers: int) -> list[str]:
    """Where operators sit: the embedding, then attention output and MLP output of every block, 2 L + 1 in all."""
    outputs = ("self_attn.o_proj", "mlp.down_proj")
    return [EMBEDDING, *(f"model.layers.{layer}.{output}" for layer in range(layers) for output in outputs)]


class PatModel(nn.Module):  # type: ignore[misc]
    """A causal model whose residual stream is masked; called as the model itself is.

    `model` is a Hugging Face model, or one that peft wrapped with LoRA. Operators act on their site's output, before
    the residual addition. `embedding_rank` 0 gives the embedding an operator that only masks.
    """

    def __init__(self, model: Any, mask: ChannelMask, *, rank: int, embedding_rank: int) -> None:
        super().__init__()
        self.model = model
        self.mask = mask
        self._inner = model.base_model.model if hasattr(model, "peft_config") else model
        self.config = self._inner.config
        self.sites = operator_sites(self.config.num_hidden_layers)
        self.operators = nn.ModuleList(
            SparsificationOperator(mask, embedding_rank if site == EMBEDDING else rank) for site in self.sites
        )
        self.operators.to(mask.proxies.device)
        for site, operator in zip(self.sites, self.operators, strict=True):
            self._inner.get_submodule(site).register_forward_hook(_passes_through(operator))

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)

    def penalty(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask's loss and the identity loss over all operators."""
        return self.mask.loss(), identity_loss(operator.down for operator in self.operators if operator.rank)

    def tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The dense tensors without operators, by name, LoRA folded in, one at a time."""
        return dense_tensors(self.model).items() if self._inner is self.model else fold_adapters(self.model)

    def operator_tensors(self) -> dict[str, OperatorTensors | None]:
        """What was trained at each site, None where the operator only masks."""
        return {
            site: OperatorTensors(**operator.tensors()) if operator.rank else None
            for site, operator in zip(self.sites, self.operators, strict=True)
        }


def _passes_through(operator: nn.Module) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = operator(output)
        return result

    return hook


class PatObjective(Objective):
    """Answers' cross-entropy + mask loss + identity loss, each with its weight; sets the mask's step."""

    def __init__(
        self,
        model: PatModel,
        *,
        active_weight: float = 1.0,
        identity_weight: float = 1.0,
        **placed: Unpack[Placed],
    ) -> None:
        super().__init__(model, **placed)
        self.pat = model
        self.active_weight = active_weight
        self.identity_weight = identity_weight

    def add_gradients(self, rows: Sequence[EncodedRow], step: int) -> dict[str, float]:
        self.pat.mask.step = step
        loss = self.add_answer_gradients(rows)
        active, identity = self.pat.penalty()
        (self.active_weight * active + self.identity_weight * identity).backward()
        return {"loss": loss, "active_loss": active.item(), "identity_loss": identity.item()}


def channel_importance(objective: PatObjective, rows: Sequence[EncodedRow]) -> torch.Tensor:
    """How much each channel's mask matters at step 0: the mean over rows of the squared gradient of their loss, [d].

    A tuned model is stationary, so the gradient's mean says next to nothing; its square is the diagonal Fisher
    information, the second-order cost of a change (arXiv 2204.09656, section 3.2). Leaves no gradients behind.
    """
    pat = objective.pat
    pat.mask.step = 0
    total = torch.zeros_like(pat.mask.proxies)
    pat.eval()
    for row in rows:
        (gradient,) = torch.autograd.grad(objective.loss([row]), pat.mask.proxies)
        total += gradient.square()
    return total / len(rows)
