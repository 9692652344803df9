"""Recipe method `fier`: the same weights, served with attention that retrieves from long contexts.

Nothing is trained. A role's quality with it is what `accept` measures, on rows as long as the role's own.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from ..agents.errors import RecipeError
from .fier_settings import HEAD_DIMS, FierSettings
from .methods import Job, Made, Method

__all__ = ["METHOD", "FierMethod"]


class FierMethod(FierSettings):
    """What a recipe says after `method: fier`; the fields are those of `FierSettings`."""

    method: Literal["fier"] = "fier"


def check(settings: FierMethod, job: Job) -> None:
    """Raise RecipeError where the checkpoint's context or heads leave nothing to retrieve."""
    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    context = config.get("max_position_embeddings")
    if context is not None and settings.budget_tokens >= context:
        raise RecipeError(
            f"budget_tokens {settings.budget_tokens}, and {job.base_name!r} has a context of {context} tokens",
            expected=f"fewer than {context}",
            remedy="Lower the budget: a budget of the whole context is stock attention.",
        )
    heads = config.get("num_attention_heads")
    width = config.get("head_dim") or (config["hidden_size"] // heads if heads else None)
    if width not in HEAD_DIMS:
        raise RecipeError(
            f"{job.base_name!r} has heads of {width} channels",
            expected=f"{' or '.join(map(str, HEAD_DIMS))}",
            remedy="Serve it with stock attention.",
        )
    if settings.dense_layers >= config.get("num_hidden_layers", settings.dense_layers + 1):
        raise RecipeError(
            f"dense_layers {settings.dense_layers}, and {job.base_name!r} has {config['num_hidden_layers']} layers",
            expected="fewer dense layers than there are",
        )


def make(settings: FierMethod, job: Job) -> Made:
    """The parent with retrieval; its card says what that takes in memory, as a share of the key-value cache."""
    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    element_bytes = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    fier = FierSettings.model_validate(settings.model_dump(exclude={"method"}))
    card: dict[str, Any] = {
        "fier": {"memory_beside_kv_cache": round(fier.cache_share(config["num_hidden_layers"], element_bytes), 4)}
    }
    return Made(ask=job.ask, card=card, fier=fier)


METHOD = Method(settings=FierMethod, make=make, needs_data=lambda settings: False, check=check)
