"""Adapters on W8A8 layers, whose int8 kernel has removed the weight that vLLM reads the device from.

vLLM 0.32 decides where a LoRA layer's tensors go by looking at its base layer's weight. oneDNN's int8 kernel keeps a
packed copy and sets `weight` to None, so an engine with `enable_lora` dies at start. On the CPU the answer is always
the same.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.layers import base_linear, utils

__all__ = ["install"]


def install() -> str:
    """Have vLLM take the CPU for layers without a weight; returns the status that `metier doctor` shows."""
    original = utils._get_lora_device

    def lora_device(base_layer: Any) -> torch.device:
        if getattr(base_layer, "weight", base_layer) is None:
            return torch.device("cpu")
        device: torch.device = original(base_layer)
        return device

    # `base_linear` has imported the function by name.
    utils._get_lora_device = base_linear._get_lora_device = lora_device
    return "active"
