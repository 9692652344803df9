"""The vLLM plugin: what vLLM calls, in every process of an engine, before it builds anything.

The entry point `vllm.general_plugins` names `register`. It puts the parts into vLLM that this version needs, after
checking that the version and every method it replaces are the ones the parts were written for.
"""

from __future__ import annotations

from .orphan_guard import end_with_parent
from .signatures import (
    COMPILE_CACHE_METHODS,
    CPU_LORA_METHODS,
    EXACT_INT8_METHODS,
    EXPERTS_METHODS,
    FIER_METHODS,
    FINITE_VALUES_METHODS,
    GPU_LORA_METHODS,
    GRAMMAR_METHODS,
    MODEL_CLASS_METHODS,
    QUANTISED_LORA_METHODS,
    SEEDED_CHUNKS_METHODS,
    THINKING_METHODS,
    TREX_METHODS,
    check_signatures,
    check_version,
)
from .wire import REASONING_PARSER, STATUS, plugin_wanted

__all__ = ["register"]


def register() -> None:
    """Install our parts in vLLM; called by vLLM in every engine process, safe to call again.

    `METIER_PLUGIN=0` leaves vLLM as it is. Raises PluginError when vLLM's version, or a method that a part replaces, is
    not the one the parts were written for: an engine must not answer wrongly without an error.
    """
    if STATUS:
        return
    end_with_parent()
    if not plugin_wanted():
        STATUS["lora"] = STATUS["trex"] = STATUS["thinking"] = STATUS["fier"] = "off (METIER_PLUGIN=0)"
        return
    import vllm
    from vllm.platforms import current_platform

    check_version(vllm.__version__)
    check_signatures(THINKING_METHODS | GRAMMAR_METHODS)
    from . import grammar_backends

    STATUS["thinking"] = _register_thinking()
    STATUS["grammars"] = grammar_backends.install()
    if not current_platform.is_cpu():
        STATUS["fier"] = "off (CPU only)"
        STATUS["lora"] = f"off (vLLM's own LoRA on {current_platform.device_type}; not run by us)"
        STATUS["trex"] = _register_gpu() if current_platform.is_cuda() else "off (no token gate on this device)"
        return
    check_signatures(CPU_LORA_METHODS | TREX_METHODS | QUANTISED_LORA_METHODS | COMPILE_CACHE_METHODS | FIER_METHODS)
    check_signatures(SEEDED_CHUNKS_METHODS)
    check_signatures(EXPERTS_METHODS | FINITE_VALUES_METHODS | EXACT_INT8_METHODS | MODEL_CLASS_METHODS)
    from . import compile_cache, exact_int8, finite_values, model_classes, seeded_chunks, without_torchvision
    from .adapters import experts_cpu, lora_cpu, quantised_lora
    from .fier import fier_attention

    STATUS["lora"] = STATUS["trex"] = lora_cpu.install()
    STATUS["experts"] = experts_cpu.install()
    STATUS["lora on int8"] = quantised_lora.install()
    STATUS["int8"] = exact_int8.install()
    STATUS["model classes"] = model_classes.install()
    STATUS["torchvision"] = without_torchvision.install()
    STATUS["compile cache"] = compile_cache.install()
    STATUS["fier"] = fier_attention.install()
    STATUS["seeded chunks"] = seeded_chunks.install()
    STATUS["finite values"] = finite_values.install()


def _register_thinking() -> str:
    """Thinking: the reasoning parser. The logits processor comes with the engine's arguments."""
    from vllm.reasoning import ReasoningParserManager

    ReasoningParserManager.register_lazy_module(
        REASONING_PARSER, "metier.runtime.plugin.thinking.thinking_parser", "EndTagParser"
    )
    return "active"


def _register_gpu() -> str:
    """T-REX on CUDA; not run on a GPU yet."""
    check_signatures(GPU_LORA_METHODS | TREX_METHODS)
    from .adapters import trex_gpu

    return trex_gpu.install()
