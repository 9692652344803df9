"""W8A8 layers on processors whose products of int8 saturate: computed with dense weights, so that answers are right.

Without VNNI oneDNN adds pairs of products in 16 bits, which overflow: logits are off by a nat. There the weights are
made dense when they are loaded, in the model's own type, and inputs are not rounded. That takes the memory of a
checkpoint that is not quantised, and is no faster than one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn import functional
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise

__all__ = ["install", "multiplies_int8"]

_ISA_WITH_VNNI = ("VNNI", "BF16", "FP16", "AMX", "DEFAULT", "ALL")


def multiplies_int8() -> bool:
    """Whether products of int8 are exact here: the processor has VNNI, and oneDNN was not told to do without."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if not any(name in allowed for name in _ISA_WITH_VNNI):
        return False
    return bool(torch.cpu._is_vnni_supported() or torch.cpu.get_capabilities().get("avx_vnni"))


def install() -> str:
    """Have vLLM compute W8A8 layers with dense weights where it has to; returns the status `metier doctor` shows."""
    if multiplies_int8():
        return "active"

    def keep_dense(self: Any, layer: torch.nn.Module) -> None:
        weight_name, scale_name, *_ = self.layer_param_names
        weight, scale = getattr(layer, weight_name), getattr(layer, scale_name)
        if scale.numel() not in (1, weight.shape[0]):  # a fused layer with one scale for each of its parts
            scale = convert_to_channelwise(scale, layer.logical_widths)
        dense = (weight.float() * scale.float().view(-1, 1)).to(torch.get_default_dtype())
        setattr(layer, weight_name, torch.nn.Parameter(dense, requires_grad=False))

    def apply_dense(
        self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return functional.linear(x, getattr(layer, self.layer_param_names[0]), bias)

    CPUInt8ScaledMMLinearKernel.process_weights_after_loading = keep_dense
    CPUInt8ScaledMMLinearKernel.apply_weights = apply_dense
    return "active (this processor has no VNNI: W8A8 is computed with dense weights, no faster than 16 bits)"
