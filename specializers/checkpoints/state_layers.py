"""Whether a model has layers that keep a state of all they have read, instead of keys and values of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["keeps_state"]

_KINDS = frozenset({"linear_attention", "conv", "mamba"})
_MAMBA_SIZES = ("mamba_d_state", "ssm_state_size")


def keeps_state(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's configuration (the part for the language model) names layers that keep a state.

    >>> keeps_state({"layer_types": ["conv", "full_attention"]}), keeps_state({"layer_types": ["full_attention"]})
    (True, False)
    """
    return bool(_KINDS & set(config.get("layer_types") or ())) or any(config.get(name) for name in _MAMBA_SIZES)
