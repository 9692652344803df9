"""The mathematics of T-REX for one linear layer: a per-token gate over rank-one experts, guided by the task.

Source: "T-REX: Mixture-of-Rank-One-Experts with Semantic-aware Intuition" (arXiv 2404.08985) and its released code.
Row i of A and column j of B make expert e = i·r2 + j, so r1 + r2 vectors give r1·r2 experts. Per token,

    h = A x,  p = softmax(W_r x),  alpha = sigmoid(100 omega)
    G = k_tok·alpha·p + k_task·(1 - alpha)·c            reshaped row by row to [r1, r2]
    z_j = sum_i h_i G_ij,  y = W0 x + sigmoid(100 gamma)·B z

with c the intuition: how much the task's text resembles each of r1·r2 clusters of training texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from ....agents.errors import AdapterError
from ...adapters.trex_shape import SHARPNESS, TrexShape

__all__ = [
    "Intuition",
    "TrexLinear",
    "ZeroIntuition",
    "combine_experts",
    "expert_gate",
    "gated_update",
    "intuition_scope",
]


def expert_gate(
    logits: torch.Tensor, intuition: torch.Tensor | None, omega: torch.Tensor, shape: TrexShape
) -> torch.Tensor:
    """The gate G [..., experts] from router logits [..., experts], in float32 whatever the logits are.

    `intuition` broadcasts against the logits ([rows, 1, experts] for [rows, tokens, experts]); None counts as zero.
    """
    alpha = torch.sigmoid(SHARPNESS * omega.float())
    gate = (shape.k_tok * alpha) * torch.softmax(logits.float(), dim=-1)
    if intuition is None:
        return gate
    return gate + (shape.k_task * (1.0 - alpha)) * intuition.float()


def combine_experts(h: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """z [..., r2] with z_j = sum_i h_i G_ij, from h [..., r1] and gate [..., r1·r2] in row-major order."""
    return (h.unsqueeze(-1) * gate.unflatten(-1, (h.shape[-1], -1))).sum(dim=-2)


def gated_update(
    x: torch.Tensor,
    a: torch.Tensor,
    router: torch.Tensor,
    b: torch.Tensor,
    omega: torch.Tensor,
    gamma: torch.Tensor,
    intuition: torch.Tensor | None,
    shape: TrexShape,
) -> torch.Tensor:
    """What the adapter adds to a layer's output, [..., d_out], for x [..., d_in].

    a [r1, d_in], router [r1·r2, d_in], b [d_out, r2], omega and gamma [1]. A and the router are one product: it
    reads x once, and it is how a serving engine packs them.
    """
    shrunk = functional.linear(x, torch.cat([a, router]))
    h, logits = shrunk.split([shape.r1, shape.experts], dim=-1)
    gate = expert_gate(logits, intuition, omega, shape)
    z = torch.sigmoid(SHARPNESS * gamma.float()) * combine_experts(h.float(), gate)
    return functional.linear(z.to(b.dtype), b)


class ZeroIntuition:
    """Asked for in place of c: counts as zero for any batch, so that the gate is the token router alone."""


Intuition: TypeAlias = torch.Tensor | ZeroIntuition

# Scoped, so that a forward never sees the intuition of an earlier batch; per thread and per task besides.
_INTUITION: ContextVar[Intuition | None] = ContextVar("metier_trex_intuition", default=None)


@contextmanager
def intuition_scope(intuition: Intuition | None) -> Iterator[None]:
    """Give c [rows, experts] to every T-REX layer that runs inside the block; None takes it away."""
    token = _INTUITION.set(intuition)
    try:
        yield
    finally:
        _INTUITION.reset(token)


class TrexLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """One adapted linear layer, in the form PEFT expects: every parameter is kept by adapter name.

    A starts as PEFT's LoRA does, B at zero, so the layer starts as its base. Raises AdapterError in a forward whose
    c is missing, or of other rows or experts than the batch and the adapter.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = (
        "lora_A",
        "lora_B",
        "lora_router",
        "trex_omega",
        "trex_gamma",
    )
    other_param_names: ClassVar[tuple[str, ...]] = ("trex_shape",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, shape: TrexShape, router_init_std: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_router = nn.ModuleDict()
        self.trex_omega = nn.ParameterDict()
        self.trex_gamma = nn.ParameterDict()
        self.trex_shape: dict[str, TrexShape] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, shape, router_init_std)

    def update_layer(self, adapter_name: str, shape: TrexShape, router_init_std: float) -> None:
        """Add an adapter to this layer."""
        self.trex_shape[adapter_name] = shape
        self.lora_A[adapter_name] = nn.Linear(self.in_features, shape.r1, bias=False)
        self.lora_B[adapter_name] = nn.Linear(shape.r2, self.out_features, bias=False)
        self.lora_router[adapter_name] = nn.Linear(self.in_features, shape.experts, bias=False)
        self.trex_omega[adapter_name] = nn.Parameter(torch.zeros(1))
        self.trex_gamma[adapter_name] = nn.Parameter(torch.zeros(1))
        nn.init.kaiming_uniform_(self.lora_A[adapter_name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter_name].weight)
        nn.init.normal_(self.lora_router[adapter_name].weight, std=router_init_std)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for scalars in (self.trex_omega, self.trex_gamma):
            # The hundredfold of a bfloat16 number is too coarse: its steps move the sigmoid by a tenth.
            if adapter_name in scalars and scalars[adapter_name].device.type != "meta":
                scalars[adapter_name] = scalars[adapter_name].float()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name not in self.trex_shape:
                continue
            shape, a = self.trex_shape[name], self.lora_A[name].weight
            update = gated_update(
                x.to(a.dtype),
                a,
                self.lora_router[name].weight,
                self.lora_B[name].weight,
                self.trex_omega[name],
                self.trex_gamma[name],
                _intuition_for(x, shape),
                shape,
            )
            result = result + update.to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the gate differs with every token, so no fixed weight equals it."""
        raise AdapterError(
            "a T-REX adapter cannot be merged into the base",
            expected="to keep it apart: its gate differs with every token",
            remedy="Export it as LoRA, with the gate frozen per cluster, and merge that.",
        )


def _intuition_for(x: torch.Tensor, shape: TrexShape) -> torch.Tensor | None:
    """c as [rows, 1, ..., experts], to broadcast over the tokens of x [rows, ..., d_in]."""
    c = _INTUITION.get()
    if isinstance(c, ZeroIntuition) or shape.k_task == 0.0:
        return None
    if c is None:
        raise AdapterError(
            "a T-REX adapter was run without its intuition",
            expected=f"c of shape [{x.shape[0]}, {shape.experts}]",
            remedy="Pass intuition=c to the model, or run it inside `with model.intuition(c):`; "
            "`with model.without_intuition():` counts c as zero.",
        )
    if c.ndim == 2 and x.ndim == 2 and x.shape[0] % c.shape[0] == 0:
        # Some models (OPT's MLP) put the tokens of all sequences into one list, sequence after sequence.
        c = c.repeat_interleave(x.shape[0] // c.shape[0], dim=0)
    if c.ndim != 2 or c.shape[0] != x.shape[0] or c.shape[1] != shape.experts:
        raise AdapterError(
            f"the intuition has shape {list(c.shape)}",
            expected=f"[{x.shape[0]}, {shape.experts}]: one row per sequence of the batch, one value per expert",
            remedy="Compute c with the adapter's own semantic map, one row per sequence; "
            "for beams, repeat each row as often as there are beams.",
        )
    return c.to(x.device).view(c.shape[0], *[1] * (x.ndim - 2), c.shape[1])
