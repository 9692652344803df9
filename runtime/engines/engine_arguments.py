"""vLLM's arguments for one of our engines, from our settings and the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...agents.errors import EngineError
from ...specializers.checkpoints.expert_layers import adaptable_names
from ...specializers.checkpoints.output_head import HEAD, stores_own_head
from ...specializers.checkpoints.state_layers import keeps_state
from ...specializers.checkpoints.tensor_files import base_tensors, read_json
from ...specializers.machine.number_types import DELTA_RULE, engine_number_type
from ..plugin.wire import FIER_KEY, LOGITS_PROCESSOR, REASONING_PARSER, plugin_wanted
from ..settings.engine import EngineSettings
from .few_bits_check import check_few_bits

__all__ = ["engine_arguments"]

# Families whose logits vLLM always computes with the embedding.
_ALWAYS_TIED = ("gemma2", "gemma3n", "cohere", "cohere2", "cohere2_moe")
_SHORT_CONVOLUTIONS = ("lfm2", "lfm2_moe")
_NO_HEAD = ("gemma2",)
"""Those of them whose loading fails at a stored head."""


def engine_arguments(weights: Path, *, dtype: str, settings: EngineSettings, adapters: bool) -> Any:
    """vLLM's own arguments for an engine on the checkpoint in `weights`.

    Without `adapters` the engine starts with no LoRA layers at all, which is faster at every step.
    """
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    lora: dict[str, Any] = {}
    if adapters:
        # As many on the CPU side as in slots: only AdapterSlots decides on eviction.
        lora = {
            "enable_lora": True,
            "max_loras": settings.adapter_slots,
            "max_cpu_loras": settings.adapter_slots,
            "max_lora_rank": settings.slot_rank,
            "lora_target_modules": adaptable_names(base_tensors(weights)),
        }
    ours = plugin_wanted()
    dtype = engine_number_type(weights, settings.dtype if dtype == "auto" else dtype).dtype
    check_few_bits(weights, dtype)
    _check_state_layers(weights, dtype)
    context_tokens = min(settings.max_model_tokens, _context_tokens(weights) or settings.max_model_tokens)
    _check_retrieval(settings, context_tokens)
    return AsyncEngineArgs(
        model=str(weights),
        tokenizer=str(weights),
        dtype=dtype,
        hf_overrides=_overrides(weights),
        seed=0,
        max_model_len=context_tokens,
        max_num_seqs=settings.max_running,
        max_num_batched_tokens=max(settings.max_batch_tokens, settings.max_running),
        kv_cache_memory_bytes=int((settings.kv_cache_mib << 20) / (1 + _beside_cache(weights, dtype, settings))),
        block_size=settings.block_tokens,
        # States are kept at the ends of blocks only, and the CPU's kernel of Mamba does not give those.
        enable_prefix_caching=not (keeps_state(_text_config(weights)) and _on_cpu()),
        scheduling_policy="priority",
        # A step's rows are then those just scheduled, which is what the meter splits its cost over.
        async_scheduling=False,
        enforce_eager=settings.runs_eagerly,
        tensor_parallel_size=settings.tensor_parallel,
        data_parallel_size=settings.data_parallel,
        disable_log_stats=False,
        use_tqdm_on_load=False,
        # Where xgrammar cannot hold a schema, the plugin takes guidance. vLLM's own "auto" allows any whitespace, and
        # small models pad JSON with newlines without end.
        structured_outputs_config=StructuredOutputsConfig(
            backend="xgrammar", disable_any_whitespace=True, reasoning_parser=REASONING_PARSER if ours else ""
        ),
        logits_processors=[LOGITS_PROCESSOR] if ours else None,
        additional_config={} if settings.fier is None else {FIER_KEY: settings.fier.model_dump()},
        **lora,
    )


def _overrides(weights: Path) -> dict[str, Any]:
    """What is to be changed in a config; raises EngineError for a head that the engine has no place for."""
    config = _text_config(weights)
    kind = config.get("model_type")
    if not stores_own_head(weights):
        if kind in _NO_HEAD and HEAD in base_tensors(weights):
            raise EngineError(
                f"the checkpoint in {str(weights)!r} stores its embedding a second time, as {HEAD}",
                expected=f"no output head: the engine has no place for one of {kind}",
                remedy="Open it with transformers and save it again, which leaves the copy out.",
            )
        return {}
    if kind in _ALWAYS_TIED:
        raise EngineError(
            f"the checkpoint in {str(weights)!r} has an output head that is not its embedding",
            expected=f"a tied head: the engine knows no other for {kind}",
            remedy="Use the base without that training, or one of another family.",
        )
    return {"tie_word_embeddings": False}  # vLLM goes by the config alone, transformers by what is stored


def _check_state_layers(weights: Path, dtype: str) -> None:
    """Raise EngineError for layers that keep a state and that the CPU's kernels compute wrongly, or not in `dtype`."""
    kind = _text_config(weights).get("model_type")
    if kind in _SHORT_CONVOLUTIONS and _on_cpu():
        raise EngineError(
            f"the model in {str(weights)!r} is of type {kind!r}, whose base vLLM computes wrongly on a CPU: a tiny one "
            "was 0.67 nat from transformers",
            expected="a base whose answers here are its own",
            remedy="Serve it on a GPU, or use another base; docs/models.md has those that agree.",
        )
    if kind in DELTA_RULE and dtype in ("float32", "float16") and _on_cpu():
        raise EngineError(
            f"the model in {str(weights)!r}, of type {kind!r}, is to be computed in {dtype}",
            expected="bfloat16, which is all that the CPU's kernel of its delta rule takes",
            remedy="Set engine.dtype to bfloat16, or leave it at auto.",
        )


def _beside_cache(weights: Path, dtype: str, settings: EngineSettings) -> float:
    """Memory that attention needs beside the key-value cache, as a share of it."""
    if settings.fier is None:
        return 0.0
    config = _text_config(weights)
    dtype = config.get("dtype", config.get("torch_dtype", "bfloat16")) if dtype == "auto" else dtype
    return settings.fier.cache_share(int(config["num_hidden_layers"]), 4 if dtype == "float32" else 2)


def _check_retrieval(settings: EngineSettings, context_tokens: int) -> None:
    """Raise EngineError where attention by retrieval is set and cannot work with these settings or checkpoint."""
    if settings.fier is None:
        return
    if not plugin_wanted():
        raise EngineError(
            "attention 'fier' is asked for, and METIER_PLUGIN=0 keeps our plugin out of vLLM",
            expected="the plugin",
            remedy="Unset METIER_PLUGIN, or use a variant with stock attention.",
        )
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise EngineError(
            f"attention 'fier' is asked for on {current_platform.device_type}",
            expected="a CPU engine: its GPU kernels are in no backend yet",
            remedy="Use a variant with stock attention here.",
        )
    if settings.fier.budget_tokens >= context_tokens:
        raise EngineError(
            f"budget_tokens {settings.fier.budget_tokens} of attention 'fier', in a context of {context_tokens} tokens",
            expected=f"fewer than {context_tokens}: all tokens would be read, which stock attention does faster",
            remedy="Lower the budget, raise max_model_tokens if the model has the context, or use stock attention.",
        )
    if settings.block_tokens % settings.fier.group_tokens:
        raise EngineError(
            f"group_tokens {settings.fier.group_tokens} of attention 'fier' with block_tokens {settings.block_tokens}",
            expected="blocks of whole groups",
            remedy="Set block_tokens to 128, or make the variant with smaller groups.",
        )


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _context_tokens(weights: Path) -> int | None:
    """The model's longest context, None where its configuration does not have it."""
    value = _text_config(weights).get("max_position_embeddings")
    return None if value is None else int(value)


def _text_config(weights: Path) -> dict[str, Any]:
    """A checkpoint's configuration; of multimodal ones, the part for the language model."""
    config = read_json(weights, "config.json")
    return {**(config.get("text_config") or {}), **config}
