"""What peft's kinds and settings mean for serving: which have no fixed weights, and which no two matrices equal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError
from ...agents.text_files import shown
from ..shelf.adapter_kinds import kind_of_peft_type
from .adapter_files import CONFIG

__all__ = ["NOT_AS_LORA", "REPEATED_STARTS", "check_mergeable"]

_PROMPT = "it puts learned vectors before the prompt, which no weights equal"
_PER_INPUT = "what it changes depends on the input, which no fixed weights equal"
_NOT_AS_WEIGHTS = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": _PROMPT,
    "XLORA": _PER_INPUT,
    "POLY": _PER_INPUT,
    "LILY": _PER_INPUT,
    "SHADOW": _PER_INPUT,
    "TREX": _PER_INPUT,
}
_MULTIPLIES = "it multiplies the base's weights or activations, so its change has the full rank of the layer"
_VECTORS = "it changes normalisations or biases, and a LoRA changes only linear layers"
NOT_AS_LORA = {
    **_NOT_AS_WEIGHTS,
    "IA3": _MULTIPLIES,
    "OFT": _MULTIPLIES,
    "BOFT": _MULTIPLIES,
    "HRA": _MULTIPLIES,
    "HIRA": _MULTIPLIES,
    "ROAD": _MULTIPLIES,
    "LN_TUNING": _VECTORS,
    "BEFT": _VECTORS,
    "TRAINABLE_TOKENS": "it changes embeddings, and a converted LoRA changes only linear layers",
}
"""Kinds that no LoRA is equal to, each with the reason; those among them that are weights can be merged."""

_SETTINGS = {
    "alora_invocation_tokens": "activated LoRA, which acts on some tokens only",
    "layer_replication": "layer replication, which makes a deeper model",
    "arrow_config": "a router between adapters",
    "use_qalora": "QALoRA, which needs the base's own GPTQ weights",
}
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
REPEATED_STARTS = ("pissa", "olora", "loftq")
"""Starts of a LoRA that change the base, in a way that the base alone determines, so that peft can repeat it."""


def check_mergeable(folder: Path, config: dict[str, Any]) -> str:
    """The peft type of the adapter with this config; raises AdapterError where no fixed weights do what it does."""
    path = folder / CONFIG
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterError(f"{path}: peft_type is {shown(kind)}", expected="a kind of adapter, as peft writes it")
    if kind in _NOT_AS_WEIGHTS:
        served = kind_of_peft_type(kind) is not None
        raise AdapterError(
            f"{path}: a {kind} adapter cannot be {'merged' if served else 'served'}: {_NOT_AS_WEIGHTS[kind]}",
            expected="an adapter that fixed weights are equal to",
            remedy=f"`metier variants add {shlex.quote(str(folder))} --name NAME` serves it as it is."
            if served
            else "Train it as LoRA or T-REX.",
        )
    for name, meaning in _SETTINGS.items():
        if config.get(name):
            raise AdapterError(
                f"{path}: {name} is {shown(config[name])}",
                expected=f"an adapter without {meaning}",
                remedy="Train it as plain LoRA.",
            )
    start = config.get("init_lora_weights")
    if start is None or isinstance(start, bool):
        return kind
    if not isinstance(start, str) or start.lower() not in (*_PLAIN_STARTS, *REPEATED_STARTS):
        raise AdapterError(
            f"{path}: init_lora_weights is {shown(start)}, which changes the base's own weights",
            expected="an adapter to the unchanged base: this start was drawn at random or from data, and is not here",
            remedy="Save it where it was trained, with peft's path_initial_model_for_weight_conversion.",
        )
    return kind
