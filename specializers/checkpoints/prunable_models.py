"""Which models can be pruned, and what each tensor of such a checkpoint is to the residual stream.

A decoder of this kind adds only two things to its residual stream in a block, the outputs of attention and of the
MLP, and what reads it takes zeros for zeros, an RMS norm too; so a channel that embedding and both outputs leave at
zero is used nowhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...agents.errors import RecipeError
from .output_head import HEAD, stores_own_head
from .tensor_files import base_tensors, read_json

__all__ = ["FAMILIES", "WIDTH_STEP", "Family", "Part", "PrunableModel", "check_width", "part_of", "read_prunable"]

WIDTH_STEP = 16
"""Pruned widths come in multiples of this, for the matrix kernels' sake; int4 kernels want multiples of 32."""

Part = Literal["embedding", "writer", "reader", "norm", "post_norm", "untouched"]
"""What a tensor is to the residual stream: it starts it, writes to it, reads it, scales what is read, scales what is
written, or has no part in it."""


@dataclass(frozen=True)
class Family:
    """What pruning must know of an architecture beyond its tensors' names."""

    architecture: str
    """The class that the merged model's config names."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Norms of a block that read the residual stream."""

    post_norms: tuple[str, ...] = ()
    """Norms of a block over the output of attention or MLP, before it is added to the stream."""

    norm_offset: float = 0.0
    """A norm multiplies by this + its gain (Gemma: 1 + w)."""

    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""

    head_norms: bool = False
    """Queries and keys are normed too, with the same epsilon."""

    raw_readers: bool = False
    """Attention and MLP read the stream itself, not a norm of it."""

    tied_only: bool = False
    """The engine knows no output head beside the embedding."""

    whole_heads: bool = False
    """transformers takes only hidden sizes that are a multiple of the heads."""

    other_widths: str | None = None
    """Model type that computes the same and takes any hidden size, for families with `whole_heads`."""

    written_as: str | None = None
    """Model type that computes the same and has a `head_dim` of its own, for families whose head size the engine
    takes to be hidden_size / heads, which pruning changes."""


_GEMMA_NORMS = ("input_layernorm", "pre_feedforward_layernorm")
_GEMMA_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES = {
    "gemma": Family("GemmaForCausalLM", norm_offset=1.0, scaled_embedding=True),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        norm_offset=1.0,
        scaled_embedding=True,
        tied_only=True,
        whole_heads=True,
        norms=_GEMMA_NORMS,
        post_norms=_GEMMA_POST_NORMS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        norm_offset=1.0,
        scaled_embedding=True,
        head_norms=True,
        whole_heads=True,
        norms=_GEMMA_NORMS,
        post_norms=_GEMMA_POST_NORMS,
    ),
    "glm4": Family("Glm4ForCausalLM", post_norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
    "granite": Family("GraniteForCausalLM"),
    "llama": Family("LlamaForCausalLM", whole_heads=True, other_widths="mistral"),
    "ministral": Family("MinistralForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        norms=(),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        head_norms=True,
        raw_readers=True,
    ),
    "phi3": Family("Phi3ForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", written_as="llama"),
    "qwen3": Family("Qwen3ForCausalLM", head_norms=True),
    "smollm3": Family("SmolLM3ForCausalLM"),
}

_LAYER = r"model\.layers\.\d+\."
_PATTERNS: dict[Part, tuple[str, ...]] = {
    "embedding": (r"model\.embed_tokens\.weight",),
    "writer": (_LAYER + r"(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)",),
    "reader": (
        _LAYER + r"(self_attn\.([qkv]|qkv)_proj|mlp\.(gate|up|gate_up)_proj)\.weight",
        r"lm_head\.weight",
    ),
    "norm": (r"model\.norm\.weight",),
    "untouched": (
        _LAYER + r"(self_attn\.([qkv]|qkv)_proj|mlp\.(gate|up|gate_up)_proj)\.bias",
        _LAYER + r"self_attn\.[qk]_norm\.weight",  # over a head's channels or all heads', which stay
    ),
}
_LOOKED_FOR = (
    "model.embed_tokens, model.layers.N.self_attn.{q,k,v,o}_proj (or qkv_proj), "
    "model.layers.N.mlp.{gate,up,down}_proj (or gate_up_proj), the norms of its family, model.norm"
)


def _needed(family: Family) -> list[tuple[str, ...]]:
    """Tensors that every checkpoint of the family has; of each tuple one way of storing it."""
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    return [
        ("model.embed_tokens.weight",),
        ("model.norm.weight",),
        *((f"{attention}{name}_proj.weight", f"{attention}qkv_proj.weight") for name in "qkv"),
        (f"{attention}o_proj.weight",),
        *((f"{mlp}{name}_proj.weight", f"{mlp}gate_up_proj.weight") for name in ("gate", "up")),
        (f"{mlp}down_proj.weight",),
        *((f"model.layers.0.{norm}.weight",) for norm in (*family.norms, *family.post_norms)),
    ]


def part_of(name: str, family: Family) -> Part:
    """What a checkpoint's tensor is to the residual stream; raises RecipeError for a name that is not known."""
    if match := re.fullmatch(_LAYER + r"(\w+)\.weight", name):
        if match[1] in family.norms:
            return "norm"
        if match[1] in family.post_norms:
            return "post_norm"
    for part, patterns in _PATTERNS.items():
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            return part
    raise RecipeError(
        f"the model has a tensor {name!r} that pruning does not know",
        expected=f"only {_LOOKED_FOR}, and lm_head",
        remedy="Start from another base: a channel that this tensor uses would be lost unseen.",
    )


@dataclass(frozen=True)
class PrunableModel:
    """The config and sizes of a checkpoint that can be pruned.

    `tied` says whether the output head is the embedding; `parameters` then counts it once.
    """

    config: dict[str, Any]
    family: Family
    parameters: int
    embedding_parameters: int
    tied: bool

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.hidden_size // self.heads)

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def intermediate_size(self) -> int:
        return int(self.config["intermediate_size"])


def read_prunable(folder: Path) -> PrunableModel:
    """Read a checkpoint folder's config and tensor names, in milliseconds and without torch.

    Raises: RecipeError for an unknown architecture (naming the modules looked for) or a quantised checkpoint,
    BaseModelError for one that is not whole.
    """
    tensors = base_tensors(folder)
    config = read_json(folder, "config.json")
    if "quantization_config" in config:
        raise RecipeError(
            "the model to prune is quantised",
            expected="weights in bfloat16, float16 or float32",
            remedy="Prune first and quantise after: put the pruning method earlier in the recipe.",
        )
    family = FAMILIES.get(str(config.get("model_type")))
    needed = _needed(family) if family else []
    missing = [names[0] for names in needed if not any(name in tensors for name in names)]
    if family is None or missing:
        raise RecipeError(
            f"the model is of type {config.get('model_type')!r}"
            + (f" and has no {', '.join(missing[:3])}" if missing else ""),
            expected=f"one of {', '.join(sorted(FAMILIES))}, with modules {_LOOKED_FOR}",
            remedy="Start from a base of one of these types.",
        )
    sizes: dict[Part, int] = {}
    total = 0
    tied = not stores_own_head(folder)
    if not tied:
        config["tie_word_embeddings"] = False  # whatever it said
    for name, info in tensors.items():
        if tied and name == HEAD:
            continue  # some writers store the tied copy
        count = math.prod(info.shape)
        total += count
        part = "embedding" if name == HEAD else part_of(name, family)
        sizes[part] = sizes.get(part, 0) + count
    return PrunableModel(config, family, total, sizes["embedding"], tied)


def check_width(name: str, value: int, now: int) -> None:
    """Check a new width: smaller than now, and a multiple of WIDTH_STEP. Raises: RecipeError with the nearest ones."""
    if value >= now:
        raise RecipeError(
            f"{name} {value} is no smaller than the model's {now}",
            expected=f"a multiple of {WIDTH_STEP} below {now}",
            remedy=f"Set {name} to {(now * 3 // 4) // WIDTH_STEP * WIDTH_STEP} for a quarter less.",
        )
    if value % WIDTH_STEP:
        below = value // WIDTH_STEP * WIDTH_STEP
        near = " or ".join(str(size) for size in (below, below + WIDTH_STEP) if 0 < size < now)
        raise RecipeError(
            f"{name} {value} is no multiple of {WIDTH_STEP}",
            expected=f"a width that matrix kernels take, such as {near}",
            remedy="Multiples of 64 can also be quantised in groups of 64; 32 is the least for int4.",
        )
