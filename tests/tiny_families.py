"""Tiny random checkpoints of many model families, made from transformers' own config classes in a second each.

A family stands here where it computes something of its own; what differs is in a few words beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_model import byte_level_bpe

__all__ = ["FAMILIES", "FAMILIES_THAT_DIFFER", "HYBRIDS", "write_tiny_family"]

_WINDOW = 16
"""Tokens of a sliding window: fewer than a test's prompts have, so that a window that is not kept is seen."""

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
# For families that take a head size of their own: hidden_size / heads would hide that they do.
_WIDE_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_DELTA_RULE = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES, **_WIDE_HEADS, "tie_word_embeddings": True},
    # An own head, and positions scaled as Llama 3 does.
    "llama3": {
        "model_type": "llama",
        **_SIZES,
        **_WIDE_HEADS,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    # Biases on all linear layers.
    "llama_biased": {
        "model_type": "llama",
        **_SIZES,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    # A sliding window in all layers.
    "mistral": {"model_type": "mistral", **_SIZES, **_WIDE_HEADS, "sliding_window": _WINDOW},
    "ministral": {
        "model_type": "ministral",
        **_SIZES,
        **_WIDE_HEADS,
        "sliding_window": _WINDOW,
        "layer_types": _MIXED,
        "tie_word_embeddings": False,
    },
    # Biases on queries, keys and values; the engine takes hidden_size / heads as the head size.
    "qwen2": {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": True},
    # Norms on queries and keys.
    "qwen3": {"model_type": "qwen3", **_SIZES, **_WIDE_HEADS, "tie_word_embeddings": True},
    # Embeddings are scaled, norms multiply by 1 + gain.
    "gemma": {"model_type": "gemma", **_SIZES, **_WIDE_HEADS, "hidden_activation": "gelu_pytorch_tanh"},
    # And windows in every other layer, norms after attention and MLP, capped attention and logits.
    "gemma2": {
        "model_type": "gemma2",
        **_SIZES,
        **_WIDE_HEADS,
        "sliding_window": _WINDOW,
        "layer_types": _MIXED,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 6.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    # And rope of two kinds, by layer.
    "gemma3": {
        "model_type": "gemma3_text",
        **_SIZES,
        **_WIDE_HEADS,
        "sliding_window": _WINDOW,
        "layer_types": _MIXED,
        "query_pre_attn_scalar": 64,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    # Fused qkv_proj and gate_up_proj.
    "phi3": {"model_type": "phi3", **_SIZES, "tie_word_embeddings": False, "sliding_window": None},
    # Embeddings, residuals, attention and logits are multiplied by numbers of the config.
    "granite": {
        "model_type": "granite",
        **_SIZES,
        "tie_word_embeddings": True,
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.1,
    },
    # Every second layer without positions.
    "smollm3": {"model_type": "smollm3", **_SIZES, "tie_word_embeddings": True, "no_rope_layer_interval": 2},
    # Norms after attention and MLP, none before; norms over all queries and keys together.
    "olmo2": {"model_type": "olmo2", **_SIZES, "tie_word_embeddings": False},
    # Fused gate_up_proj, rope on half of each head, norms around everything.
    "glm4": {
        "model_type": "glm4",
        **_SIZES,
        **_WIDE_HEADS,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    # Layer norms with biases, an MLP without a gate.
    "starcoder2": {"model_type": "starcoder2", **_SIZES, "use_bias": True, "tie_word_embeddings": True},
    # Attention and MLP beside each other, logits scaled.
    "cohere": {"model_type": "cohere", **_SIZES, "logit_scale": 0.25, "tie_word_embeddings": True},
    # Mixtures of experts.
    "mixtral": {
        "model_type": "mixtral",
        **_SIZES,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SIZES,
        **_WIDE_HEADS,
        **_EXPERTS,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "olmoe": {"model_type": "olmoe", **_SIZES, **_EXPERTS, "tie_word_embeddings": False},
    # Learned positions, other names throughout, linear layers stored transposed.
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 1024},
    "opt": {
        "model_type": "opt",
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
    },
}
"""Name → what its config is made of, `model_type` first."""

HYBRIDS: dict[str, dict[str, Any]] = {
    # Layers that keep a state: a gated delta rule in all but every second layer, a short convolution before it.
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        **_SIZES,
        **_WIDE_HEADS,
        **_DELTA_RULE,
        "layer_types": _LINEAR,
        "tie_word_embeddings": False,
    },
    # Gated short convolutions.
    "lfm2": {
        "model_type": "lfm2",
        **_SIZES,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": True,
    },
    # Mamba 2 in every second layer, with Granite's multipliers.
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        **_SIZES,
        **_MAMBA,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 128,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "position_embedding_type": "rope",
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.1,
        "tie_word_embeddings": True,
    },
    # Attention and Mamba 2 beside each other in every layer.
    "falcon_h1": {
        "model_type": "falcon_h1",
        **_SIZES,
        **_WIDE_HEADS,
        **_MAMBA,
        "mamba_d_ssm": 128,
        "tie_word_embeddings": False,
    },
    # Attention sinks, and experts in tensors of all of them together.
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_SIZES,
        **_WIDE_HEADS,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": _WINDOW,
        "layer_types": _MIXED,
        "tie_word_embeddings": False,
    },
}
"""Families with layers that keep a state, and GPT-OSS: docs/models.md says in words what works; as `FAMILIES`."""

FAMILIES_THAT_DIFFER = (
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "granite",
    "smollm3",
    "olmo2",
    "qwen3_moe",
)
"""Those that differ in kind, for tests that a run of the whole suite can afford."""


def write_tiny_family(
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    weight_std: float = 0.15,
    dtype: str = "float32",
    vocab: int = 512,
    **changes: Any,
) -> Path:
    """Write a random checkpoint of a family of `FAMILIES` or `HYBRIDS` and return its folder.

    It has a tokenizer and a chat template.

    `changes` are fields of its config. All weights are random, norms and biases too, so that none of them can be
    left out unseen; `weight_std` is as in `write_tiny_llama`. The same arguments give the same bytes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_bpe(vocab)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        **{
            **{**FAMILIES, **HYBRIDS}[name],
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **changes,
        }
    )
    with torch.random.fork_rng():  # some families draw what the others set
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * weight_std)
            elif place.endswith("bias"):
                parameter.copy_(drawn * 0.1)
            else:  # gains of norms, around what the family starts them with
                parameter.add_(drawn * 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
