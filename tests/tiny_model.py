"""Tiny random Llama checkpoints and LoRA adapters for tests: real formats, made in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["LINEAR_TARGETS", "byte_level_bpe", "linear_shapes", "write_random_lora", "write_tiny_llama"]

LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Enough repetition for a few hundred merges, so that prompts are not one token per letter.
_TOKENIZER_CORPUS = (
    "The planner writes a plan, the solver solves it and the critic checks the answer.",
    "You are a helpful agent. Write the answer as JSON with the keys value, correct and why.",
    '{"expression": "12 + 7 - 3", "value": 16, "correct": true, "why": "it adds up"}',
    "How many legs do three dogs, two spiders and one duck have in total?",
    "State the final answer as one integer. Twelve plus seven minus three is sixteen.",
    "system user assistant system user assistant system user assistant",
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate: int = 128,
    vocab: int = 512,
    max_positions: int = 2048,
    weight_std: float = 0.15,
    dtype: str = "float32",
) -> Path:
    """Write a random Llama with a byte-level BPE tokenizer and a chat template into `folder`, and return it.

    The embeddings are tied, as in SmolLM2. `head_dim` must be one that vLLM's CPU attention knows (32, 64…).
    `weight_std` is far above the usual 0.02, so that the next-token distribution is not flat and an adapter
    changes it visibly. The same arguments give the same bytes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_bpe(vocab)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        initializer_range=weight_std,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def write_random_lora(
    folder: Path,
    base: Path,
    *,
    rank: int = 8,
    targets: Sequence[str] = LINEAR_TARGETS,
    seed: int = 0,
    scale: float = 2.0,
    weight_std: float = 0.1,
    dtype: str = "float32",
) -> Path:
    """Write a random LoRA adapter of `base` in the peft layout into `folder`, and return it.

    Both halves are random (peft itself starts with B = 0, which would change nothing). `scale` is
    lora_alpha / rank. `targets` are module names as in `LINEAR_TARGETS`.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = {}
    for name, d_in, d_out in linear_shapes(base, targets):
        a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        b = torch.randn(d_out, rank, generator=generator) * weight_std
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(getattr(torch, dtype))
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def linear_shapes(base: Path, targets: Sequence[str] = LINEAR_TARGETS) -> Iterator[tuple[str, int, int]]:
    """Yield (module path, d_in, d_out) of every target linear layer of a checkpoint folder."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if "intermediate_size" not in config:  # GPT-2 and OPT name everything otherwise
        yield from _shapes_by_transformers(base, targets)
        return
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {
        "q_proj": ("self_attn", hidden, q),
        "k_proj": ("self_attn", hidden, kv),
        "v_proj": ("self_attn", hidden, kv),
        "o_proj": ("self_attn", q, hidden),
        "gate_proj": ("mlp", hidden, inner),
        "up_proj": ("mlp", hidden, inner),
        "down_proj": ("mlp", inner, hidden),
        # As some families fuse them, or call them without a gate.
        "qkv_proj": ("self_attn", hidden, q + 2 * kv),
        "gate_up_proj": ("mlp", hidden, 2 * inner),
        "c_fc": ("mlp", hidden, inner),
        "c_proj": ("mlp", inner, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        for target in targets:
            block, d_in, d_out = shapes[target]
            yield f"model.layers.{layer}.{block}.{target}", d_in, d_out


def _shapes_by_transformers(base: Path, targets: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """As `linear_shapes`, by transformers' own names; transposed layers (GPT-2's) count as well."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets and hasattr(module, "weight"):
            shape = tuple(module.weight.shape)
            d_out, d_in = shape if isinstance(module, torch.nn.Linear) else reversed(shape)
            yield name, d_in, d_out


def byte_level_bpe(vocab: int) -> Any:
    """Train a byte-level BPE tokenizer of at most `vocab` tokens on a few sentences; any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=1,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_TOKENIZER_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
