"""A pruned checkpoint computes what the model does without what was dropped, checked before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....agents.errors import TrainingError
from ...checkpoints.attention import model_of

if TYPE_CHECKING:
    import torch

__all__ = ["check_pruned"]

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit, that float32 rounding may leave."""

_TOKENS = 48


def check_pruned(model: Any, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Compare a model made of `tensors` and `config` with `model`, in which what was dropped has no effect.

    Both in float32, on a few dozen random tokens. Raises: TrainingError when they differ.
    """
    import torch
    from transformers import AutoConfig

    pruned = model_of(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    missed = pruned.load_state_dict(tensors, strict=False)
    if missed.unexpected_keys or set(missed.missing_keys) - {"lm_head.weight"}:
        raise TrainingError(f"the pruned model does not load: {missed}", expected="its own tensors, all of them")
    pruned.tie_weights()
    tokens = torch.randint(int(config["vocab_size"]), (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (one.eval()(input_ids=tokens, use_cache=False).logits for one in (model, pruned))
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise TrainingError(
            f"the pruned model's logits differ by {error:.2g} of the largest from the model's without what was dropped",
            expected=f"at most {TOLERANCE}, which is rounding",
            remedy="This model computes something that pruning does not know; start from another base.",
        )
