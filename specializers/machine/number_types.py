"""What `dtype: auto` is on this machine: the number type that it computes fastest, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.tensor_files import read_json
from ..shelf.base_model import base_fingerprint
from .machine import memory_bytes, processor_flags, vllm_version
from .measured_speed import known_speed, read_speeds

__all__ = [
    "DELTA_RULE",
    "NumberType",
    "engine_choices",
    "engine_number_type",
    "training_number_type",
    "usual_number_type",
]

MOST_OF_MEMORY = 0.5
"""Weights are not widened to float32 when they would then take more than this share of the machine's memory."""


NATIVE = {"bfloat16": {"avx512_bf16", "amx_bf16"}, "float16": {"avx512_fp16", "amx_fp16"}}
"""Instructions that multiply a type without widening it first; any of them will do."""


DELTA_RULE = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
"""Model types with layers of a gated delta rule, which vLLM's CPU kernel computes in bfloat16 only."""


@dataclass(frozen=True)
class NumberType:
    """A number type, `auto` where vLLM decides, and why it is this one."""

    dtype: str
    reason: str

    def __str__(self) -> str:
        return f"{'what vLLM chooses' if self.dtype == 'auto' else self.dtype} ({self.reason})"


def engine_choices(weights: Path) -> tuple[str, ...]:
    """The number types to choose from for an engine on the checkpoint in `weights`; empty where vLLM decides."""
    return _choices(weights)[0]


def engine_number_type(weights: Path, asked: str) -> NumberType:
    """What an engine on the checkpoint in `weights` computes in, where settings and variant say `asked`.

    On a GPU and for checkpoints whose kernels take few types, vLLM decides. Otherwise what was measured decides,
    and without a measurement what the processor can multiply.
    """
    if asked != "auto":
        return NumberType(asked, "it is set")
    choices, reason = _choices(weights)
    if not choices:
        return NumberType("auto", reason)
    if len(choices) == 1:
        return NumberType(choices[0], reason)
    speed = known_speed(base_fingerprint(weights)) if read_speeds() else None
    if speed is not None and speed.fastest(speed.engine) in choices:
        return NumberType(speed.fastest(speed.engine), speed.reason(speed.engine))
    return _by_instructions(choices[0])


def _choices(weights: Path) -> tuple[tuple[str, ...], str]:
    """The types to choose from, and why there is no choice, or none but the first."""
    if "cpu" not in (vllm_version() or ""):
        return (), "the engine computes on a GPU"
    if not processor_flags():
        return (), "what the processor can do is not known"
    if not (weights / "config.json").is_file():
        return (), "the checkpoint does not say what it is"
    config = read_json(weights, "config.json")
    quantised = config.get("quantization_config")
    if quantised is not None and not _takes_float32(quantised):
        return (), "the kernels of its quantised weights take few types"
    config = {**config.get("text_config", {}), **config}
    if config.get("model_type") in DELTA_RULE:
        return ("bfloat16",), "the kernel of its delta rule takes nothing else"
    own = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if own == "float16":  # exact in float32, and three bits less in bfloat16
        return ("float16", "float32"), ""
    wide_bytes = 2 * sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    if own != "float32" and quantised is None and wide_bytes > MOST_OF_MEMORY * memory_bytes():
        there = f"{memory_bytes() / 2**30:.0f}"
        return (own,), f"float32 would take {wide_bytes / 2**30:.0f} of this machine's {there} GiB"
    return ("bfloat16", "float32"), ""


def usual_number_type() -> NumberType:
    """What engines on plain bfloat16 checkpoints compute in here."""
    speed = known_speed()
    if speed is not None and speed.fastest(speed.engine) != "float16":
        return NumberType(speed.fastest(speed.engine), speed.reason(speed.engine))
    return _by_instructions("bfloat16")


def _by_instructions(narrow: str) -> NumberType:
    """`narrow`, of 16 bits, where the processor multiplies it; emulated, it is slower than float32."""
    if processor_flags() & NATIVE[narrow]:
        return NumberType(narrow, "the processor multiplies it natively")
    return NumberType("float32", f"the processor has no {narrow} instructions")


def training_number_type(device: str, asked: str) -> NumberType:
    """What the wide products of training run in on `device`, where the recipe says `asked`."""
    if asked != "auto":
        return NumberType(asked, "the recipe says so")
    if device == "cuda":
        import torch

        able = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return NumberType("bfloat16" if able else "float32", f"the GPU multiplies bfloat16: {'yes' if able else 'no'}")
    speed = known_speed()
    if speed is not None and speed.training:
        return NumberType(speed.fastest(speed.training), speed.reason(speed.training))
    return _by_instructions("bfloat16")


def _takes_float32(quantised: dict[str, Any]) -> bool:
    """Whether vLLM's CPU kernels serve these weights in float32: 8-bit integers beside 8-bit activations, not less."""
    groups = (quantised.get("config_groups") or {}).values()
    return quantised.get("quant_method") == "compressed-tensors" and all(
        (group.get(part) or {}).get("num_bits") == 8 and (group.get(part) or {}).get("type") == "int"
        for group in groups
        for part in ("weights", "input_activations")
    )
