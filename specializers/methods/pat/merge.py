"""Merging what PAT trained into an ordinary, smaller, dense checkpoint.

With K the kept channels, D = I + L1 L0, v the scale and LoRA folded into W before:

    embedding     E' = (E D^T)[:, K] * v_K            o_proj, down_proj   W' = v_K * (D W)[K, :],  b' = v_K * (D b)_K
    other layers  W' = W[:, K]                        norms               g' = g_K * sqrt(d / |K|)

and eps' = eps * d / |K|, since the mean square is now taken over fewer channels. The paper mentions neither of the
norm's corrections, the released merge lacks eps' and never reads v. Where other norms share the epsilon (Qwen3's, over
queries and keys) it must stay: there the whole residual stream is multiplied by sqrt(|K| / d) instead, which gives the
norms the same mean square as before, and a tied head's norm takes that factor out again. Norms over what is written
(Gemma 2) then keep their gain, and what reads the stream without a norm (OLMo 2) takes the factor out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....agents.errors import RecipeError
from ...checkpoints.prunable_models import FAMILIES, WIDTH_STEP, Family, PrunableModel, part_of

__all__ = [
    "EMBEDDING",
    "OperatorTensors",
    "exported_type",
    "merge_embedding",
    "merge_model",
    "merge_norm_gain",
    "merge_writer",
    "merged_config",
    "merged_parameters",
]

EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class OperatorTensors:
    """L0 [r, d], L1 [d, r] and v [d] of one operator."""

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor


def merge_writer(weight: torch.Tensor, operator: OperatorTensors, keep: torch.Tensor) -> torch.Tensor:
    """v_K * (D W)[K] of an output projection's weight [d, n] or bias [d]: a bias goes through the operator too."""
    mixed = weight + operator.up @ (operator.down @ weight)
    scale = operator.scale[keep]
    return mixed[keep] * (scale.unsqueeze(-1) if weight.dim() == 2 else scale)


def merge_embedding(weight: torch.Tensor, operator: OperatorTensors | None, keep: torch.Tensor) -> torch.Tensor:
    """(E D^T)[:, K] * v_K of an embedding [vocabulary, d]; without an operator its kept columns."""
    if operator is None:
        return weight[:, keep]
    mixed = weight + (weight @ operator.down.T) @ operator.up.T
    return mixed[:, keep] * operator.scale[keep]


def merge_norm_gain(
    gain: torch.Tensor, keep: torch.Tensor, *, offset: float = 0.0, factor: float = 1.0
) -> torch.Tensor:
    """The gain [|K|] of an RMS norm over the kept channels only, times `factor`.

    `offset` is 1 where a norm multiplies by 1 + gain.
    """
    return (offset + gain[keep]) * (factor * math.sqrt(len(gain) / len(keep))) - offset


def merge_model(
    tensors: Iterable[tuple[str, torch.Tensor]],
    operators: Mapping[str, OperatorTensors | None],
    keep: torch.Tensor,
    family: Family,
    *,
    hidden_size: int,
    tied: bool,
    untie: bool,
) -> dict[str, torch.Tensor]:
    """The tensors of the dense model that computes what the masked one does.

    `tensors` are the base's by name, of `hidden_size` channels, LoRA folded in, read once in order, so that they need
    not all be in memory; `operators` map each site (`model.embed_tokens`, a layer's
    `…self_attn.o_proj`, …) to what was trained there, None for an operator that only masks. `untie` gives a `tied`
    head a matrix of its own, which is needed as soon as the embedding is changed beyond dropping channels.
    Raises: RecipeError for a tensor pruning does not know, or a site without an entry.
    """
    ratio = math.sqrt(hidden_size / len(keep))
    stream = 1 / ratio if family.head_norms else 1.0
    # A scaled embedding is multiplied by the root of the model's own, now smaller, hidden size.
    embedding = stream * (ratio if family.scaled_embedding else 1.0)
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        part = part_of(name, family)
        if part == "embedding":
            merged[name] = embedding * merge_embedding(tensor, operators[EMBEDDING], keep)
            if untie:
                merged["lm_head.weight"] = tensor[:, keep]
        elif part == "writer":
            site = name.rpartition(".")[0]
            if site not in operators:
                raise RecipeError(f"there is no operator behind {site}", expected="one behind every output projection")
            operator = operators[site]
            merged[name] = stream * (tensor[keep] if operator is None else merge_writer(tensor, operator, keep))
            if family.written_as and name.endswith("self_attn.o_proj.weight"):  # where all four have biases
                merged[f"{site}.bias"] = tensor.new_zeros(len(keep))
        elif part == "reader":
            raw = family.raw_readers and name != "lm_head.weight"
            merged[name] = tensor[:, keep] / (stream if raw else 1.0)
        elif part == "norm":
            factor = 1 / embedding if tied and not untie and name == "model.norm.weight" else 1.0
            merged[name] = merge_norm_gain(tensor, keep, offset=family.norm_offset, factor=factor)
        elif part == "post_norm":
            merged[name] = merge_norm_gain(tensor, keep, offset=family.norm_offset, factor=stream)
        else:
            merged[name] = tensor
    return merged


def exported_type(model: PrunableModel, hidden_size: int) -> str:
    """The model type a merged model is written as, by its family's `written_as` and `other_widths`.

    Llama's config, say, refuses a hidden size that is no multiple of the heads, even with `head_dim` given; Mistral
    without a sliding window is the same computation, and takes any.
    Raises: RecipeError when the model has what the other type lacks.
    """
    own = str(model.config["model_type"])
    kind = model.family.written_as or own
    if kind != own and model.config.get("use_sliding_window"):
        raise RecipeError(
            f"the model is of type {own} with a sliding window, and would have to be written as {kind}, which has none",
            expected="a base without use_sliding_window",
            remedy="Prune its depth or the width of its MLPs instead: depth_pruning, width_pruning.",
        )
    family = FAMILIES[kind]
    if not family.whole_heads or hidden_size % model.heads == 0:
        return kind
    biased = kind != own or model.config.get("attention_bias") or model.config.get("mlp_bias")
    if family.other_widths is None or biased:
        step = math.lcm(model.heads, WIDTH_STEP)
        why = f", and {family.other_widths} has no biases, which this model has" if family.other_widths else ""
        raise RecipeError(
            f"hidden_size {hidden_size} is no multiple of the model's {model.heads} heads",
            expected=f"such a multiple: {kind} takes no other{why}",
            remedy=f"Set hidden_size to a multiple of {step}, such as {max(step, hidden_size // step * step)}.",
        )
    return family.other_widths


# What the config of one type holds and the type it is written as does not know.
_OWN_ENTRIES = {
    "llama": ("attention_bias", "mlp_bias", "pretraining_tp"),
    "qwen2": ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
}


def merged_config(model: PrunableModel, hidden_size: int, *, untie: bool) -> dict[str, Any]:
    """The config of the merged model: its own hidden size, the epsilon that goes with it, `head_dim` spelt out.

    Raises: RecipeError as `exported_type`.
    """
    own, kind = str(model.config["model_type"]), exported_type(model, hidden_size)
    config = dict(model.config)
    if kind != own:
        for name in _OWN_ENTRIES[own]:
            config.pop(name, None)
        config |= {"sliding_window": None} if kind == "mistral" else {"attention_bias": True, "mlp_bias": False}
    epsilon = float(config.get("rms_norm_eps", 1e-6))
    return {
        **config,
        "model_type": kind,
        "architectures": [FAMILIES[kind].architecture],
        "hidden_size": hidden_size,
        "head_dim": model.head_dim,
        "rms_norm_eps": epsilon if model.family.head_norms else epsilon * model.hidden_size / hidden_size,
        "tie_word_embeddings": model.tied and not untie,
    }


def merged_parameters(model: PrunableModel, hidden_size: int, *, untie: bool) -> int:
    """How many parameters the merged model will have: all but head norms and input biases shrink by the same share."""
    embedding = int(model.config["vocab_size"]) * hidden_size
    share = hidden_size / model.hidden_size
    return round(model.parameters * share) + (embedding if untie else 0)
