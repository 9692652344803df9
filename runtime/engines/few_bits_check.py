"""What of few-bit weights this machine's engine cannot compute, said before the engine starts and not at every ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...agents.errors import EngineError

__all__ = ["check_few_bits", "few_bits_of"]


def few_bits_of(weights: Path) -> str | None:
    """`int4` for 4-bit weights with inputs in 16 bits, `fp8` for float8 with a scale for a whole matrix, else None."""
    config: dict[str, Any] = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    quantisation = config.get("quantization_config") or {}
    method = quantisation.get("quant_method")
    if method == "fp8":
        return None if quantisation.get("weight_block_size") else "fp8"
    if method in ("awq", "gptq"):
        return "int4" if quantisation.get("bits", quantisation.get("w_bit")) == 4 else None
    if method != "compressed-tensors":
        return None
    for group in quantisation.get("config_groups", {}).values():
        kind = group.get("weights") or {}
        if kind.get("num_bits") == 4 and kind.get("type") == "int" and not group.get("input_activations"):
            return "int4"
        if kind.get("num_bits") == 8 and kind.get("type") == "float" and kind.get("strategy") == "tensor":
            return "fp8"
    return None


def check_few_bits(weights: Path, dtype: str) -> None:
    """Raise EngineError where the CPU has no kernel for the weights, or it takes no numbers of this `dtype`."""
    bits = few_bits_of(weights)
    if bits is None:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch

    if bits == "fp8":
        raise EngineError(
            f"the weights in {str(weights)!r} are float8 with one scale for a whole matrix",
            expected="a scale for each row: vLLM fuses matrices of different scales by a kernel that the CPU lacks",
            remedy="Use weights with a scale for each channel, a w8a8 variant, or weights in 16 bits.",
        )
    if dtype == "float32":
        raise EngineError(
            f"the weights in {str(weights)!r} have 4 bits, and the engine is to compute in float32",
            expected="bfloat16 or float16, which the CPU's kernel for 4 bits takes",
            remedy="Set dtype: bfloat16, or use a w8a8 variant, which any dtype serves.",
        )
    if not torch.cpu._is_avx512_supported():
        raise EngineError(
            f"the weights in {str(weights)!r} have 4 bits, and this processor has no AVX-512",
            expected="a processor with AVX-512: vLLM has no kernel for 4 bits below it",
            remedy="Use a w8a8 variant, or weights in 16 bits.",
        )
