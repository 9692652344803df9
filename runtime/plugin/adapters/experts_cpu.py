"""Mixtures of experts beside adapters on the CPU: experts keep the kernel they have without adapters.

With LoRA on, vLLM 0.32 takes a Triton kernel for experts, whether or not any adapter touches them; the CPU has no
Triton, and every ask fails. Our engines adapt no experts (`lora_target_modules`), so the CPU's own kernel is right.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

__all__ = ["install"]


def install() -> str:
    """Have experts choose their kernel as if there were no adapters; returns "active"."""
    original = FusedMoEConfig.__post_init__

    def without_adapters(self: Any) -> None:
        self.is_lora_enabled = False
        original(self)

    FusedMoEConfig.__post_init__ = without_adapters
    return "active"
