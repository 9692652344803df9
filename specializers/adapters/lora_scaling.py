"""The rank and the scaling of each layer of a LoRA, as its configuration says them: peft's own rules.

Sources: Hu et al., "LoRA" (alpha ÷ rank); Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with
LoRA" (alpha ÷ √rank). Nothing else in the project computes these two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["layer_alpha", "layer_rank", "layer_scaling"]


def layer_rank(config: Mapping[str, Any], module: str) -> int:
    """Declared rank of the layer `module`, named as in the base."""
    return int(_of_layer(config.get("rank_pattern"), module, config["r"]))


def layer_alpha(config: Mapping[str, Any], module: str) -> float:
    """Declared alpha of the layer `module`, named as in the base."""
    return float(_of_layer(config.get("alpha_pattern"), module, config["lora_alpha"]))


def layer_scaling(config: Mapping[str, Any], module: str) -> float:
    """What B A is multiplied by at the layer `module`, named as in the base."""
    rank = layer_rank(config, module)
    return layer_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    # A pattern matches the end of the module's name, from a dot on; the first match wins.
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
