"""Opening a checkpoint in transformers with the attention that its family computes with.

transformers takes torch's own attention (SDPA) where a model's class allows it. That kernel leaves out what it does
not know, without a word: soft-capped scores (Gemma 2) would be trained uncapped, and served capped. So which attention
a model needs is read from its config and its class, and every model we compute with is opened here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...agents.errors import BaseModelError
from .opened_by_transformers import opened_by_transformers

if TYPE_CHECKING:
    import torch

__all__ = [
    "AttentionName",
    "attention_of",
    "model_of",
    "open_model",
    "register_attention",
    "register_float32_attention",
]

AttentionName = Literal["eager", "sdpa"]


def attention_of(config: Any) -> AttentionName:
    """The attention that computes what a model of this transformers config means: SDPA where that knows it all.

    `eager` for scores that are soft-capped, and for classes that do not offer SDPA, such as those with attention
    sinks.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "eager"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if model_class is None or model_class._supports_sdpa else "eager"


def open_model(
    folder: Path, *, dtype: torch.dtype | Literal["auto"], attention: Callable[[AttentionName], str] | None = None
) -> Any:
    """Open a checkpoint of plain weights as a transformers model, with the attention that its family needs.

    `attention` may put another around it: it gets the name, and returns that of the one it has registered.
    Raises: BaseModelError when transformers cannot open it, would draw some of its weights at random because they are
    not stored, or reads it in both directions.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    with opened_by_transformers(folder, "config"):
        config = AutoConfig.from_pretrained(folder)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise BaseModelError(
            f"the model in {folder}, of type {config.model_type!r}, reads texts in both directions",
            expected="a causal language model, which writes a token after another",
            remedy="Use another base.",
        )
    own = attention_of(config)
    name = own if attention is None else attention(own)
    with opened_by_transformers(folder, "model"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=name, output_loading_info=True
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise BaseModelError(
            f"the checkpoint in {folder} lacks {len(missing)} tensors of its model, {missing[0]} first",
            expected=f"all that a model of type {config.model_type!r} has, since its config.json says it is one",
            remedy="Copy or download the model again, with its own config.json.",
        )
    return model


def model_of(config: Any, *, dtype: torch.dtype) -> Any:
    """A transformers model of this config, with the attention that its family needs and no weights of meaning yet."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention_of(config))


def register_attention(label: str, inner: AttentionName, around: Callable[..., Any]) -> str:
    """Make transformers know an attention that does something around another one, and return its name.

    `around(attend, module, query, key, value, mask, **options)` is called for each layer; `attend` takes the rest and
    is what a model with `inner` would compute: for `eager` each family's own, where soft caps and sinks are.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    def attention(module: Any, *states: Any, **options: Any) -> Any:
        own = (
            sdpa_attention_forward if inner == "sdpa" else sys.modules[type(module).__module__].eager_attention_forward
        )
        return around(own, module, *states, **options)

    name = f"{label}_{inner}"
    AttentionInterface.register(name, attention)
    # Without a mask of its own transformers gives it none, and windows would be ignored.
    AttentionMaskInterface.register(name, sdpa_mask if inner == "sdpa" else eager_mask)
    return name


def register_float32_attention(inner: AttentionName) -> str:
    """Make transformers know an attention that computes in float32 under autocast, and return its name.

    torch's CPU kernel runs its backward in bfloat16 at a third of the speed of float32 (2.13), and less exactly.
    """
    import torch

    def in_float32(attend: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        with torch.autocast(query.device.type, enabled=False):
            return attend(module, query.float(), key.float(), value.float(), mask, **options)

    return register_attention("float32", inner, in_float32)
