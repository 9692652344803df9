"""Recipe method `fier`: the same weights, served with attention that retrieves from long contexts.

Nothing is trained. With `choose` the budget is picked on a role's own long asks, else it is what the recipe says; a
role's quality with it is what `accept` measures.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ....agents.errors import RecipeError
from ...checkpoints.state_layers import keeps_state
from ...checkpoints.tensor_files import read_json
from ...shelf.fier_settings import HEAD_DIMS, MAX_SHARED_HEADS, FierSettings
from ..asked_role import RoleSettings
from ..method import Job, Made, Method

__all__ = ["METHOD", "BudgetChoice", "FierMethod"]


class BudgetChoice(RoleSettings):
    """How FIER's budget is picked: by the role's score at each, on the asks in the recipe's `data`.

    >>> BudgetChoice(role="reports.py:reader", budgets=(128, 256)).margin
    0.03
    """

    budgets: tuple[int, ...] = Field(default=(64, 128, 256, 512), min_length=1)
    """Budgets to measure, in tokens, rising."""

    margin: float = Field(default=0.03, ge=0.0, le=1.0)
    """The smallest budget is picked whose score is at most this far below full attention's."""

    recall_rows: int = Field(default=4, ge=0)
    """Longest rows, this many, on which recall is measured."""

    @field_validator("budgets")
    @classmethod
    def _rising(cls, budgets: tuple[int, ...]) -> tuple[int, ...]:
        if list(budgets) != sorted(set(budgets)) or budgets[0] < 1:
            raise ValueError("rising numbers of tokens, each once")
        return budgets


class FierMethod(FierSettings):
    """What a recipe says after `method: fier`: the fields of `FierSettings`, and `choose`.

    >>> FierMethod(choose={"role": "reports.py:reader"}, min_context_tokens=1024).choose.budgets
    (64, 128, 256, 512)
    """

    method: Literal["fier"] = "fier"

    # Recipes without it keep the identity they had before there was one.
    choose: BudgetChoice | None = Field(default=None, exclude_if=lambda choose: choose is None)
    """Picks `budget_tokens` by measuring, instead of naming it."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.choose is not None and "budget_tokens" in self.model_fields_set:
            raise ValueError("budget_tokens is what `choose` picks; give one of the two")
        if self.choose is not None and self.choose.budgets[0] < self.sink_tokens:
            raise ValueError(f"sink_tokens {self.sink_tokens} are more than the budget {self.choose.budgets[0]}")
        return self

    @property
    def retrieval(self) -> FierSettings:
        """The engine's settings, with the budget the recipe names."""
        return FierSettings.model_validate(self.model_dump(exclude={"method", "choose"}))


def check(settings: FierMethod, job: Job) -> None:
    """Raise RecipeError where the checkpoint's context or heads leave nothing to retrieve."""
    config = read_json(job.model, "config.json")
    context = config.get("max_position_embeddings")
    largest = settings.budget_tokens if settings.choose is None else settings.choose.budgets[-1]
    if context is not None and largest >= context:
        raise RecipeError(
            f"budget_tokens {largest}, and {job.base_name!r} has a context of {context} tokens",
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
    reason = _stock_everywhere(config)
    if reason:
        raise RecipeError(
            f"{job.base_name!r} has {reason}, which retrieval does not know",
            expected="attention to the whole context in some layers at least",
            remedy="Serve it with stock attention.",
        )
    if settings.dense_layers >= config.get("num_hidden_layers", settings.dense_layers + 1):
        raise RecipeError(
            f"dense_layers {settings.dense_layers}, and {job.base_name!r} has {config['num_hidden_layers']} layers",
            expected="fewer dense layers than there are",
        )


def _stock_everywhere(config: dict[str, Any]) -> str:
    """Why engines would keep stock attention in every layer of a model, "" where some retrieve."""
    if config.get("attn_logit_softcapping"):
        return "capped attention logits"
    if config.get("model_type") == "gpt_oss":
        return "learned attention sinks"
    if keeps_state(config):
        return "layers that keep a state"
    heads = config.get("num_attention_heads") or 1
    shared = heads // (config.get("num_key_value_heads") or heads)
    if shared > MAX_SHARED_HEADS:
        return f"{shared} query heads on one key-value head, more than {MAX_SHARED_HEADS}"
    kinds = config.get("layer_types")
    if kinds:
        return "" if "full_attention" in kinds else "no layer of full attention"
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    mixed = config.get("sliding_window_pattern") or config.get("model_type") in ("gemma2", "gemma3_text")
    return "a sliding window in every layer" if windowed and not mixed else ""


def make(settings: FierMethod, job: Job) -> Made:
    """The parent with retrieval; its card says what that takes in memory, as a share of the key-value cache.

    With `choose` it also has the role's quality, its speed and the recall at every budget.
    Raises: RecipeError as `asked_role`, and where no ask is long enough to retrieve from; QualityError where no
    budget holds the role's quality; what the backend raises.
    """
    config = read_json(job.model, "config.json")
    element_bytes = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    fier = settings.retrieval
    card: dict[str, Any] = {}
    if settings.choose is not None:
        fier, card = _choose(settings.choose, fier, job)
    if job.adapter is not None:
        shutil.copytree(job.adapter, job.out / "adapter")
    memory = round(fier.cache_share(config["num_hidden_layers"], element_bytes), 4)
    return Made(
        ask=job.ask, card={**card, "fier": {"memory_beside_kv_cache": memory, **card.get("fier", {})}}, fier=fier
    )


def _choose(choice: BudgetChoice, fier: FierSettings, job: Job) -> tuple[FierSettings, dict[str, Any]]:
    from .retrieval_recall import measure_recall
    from .sweep import held_budget, prompt_tokens, sweep_budgets

    prompts = sorted(prompt_tokens(job.model, job.rows, job.template), key=len, reverse=True)
    shortest = max(fier.min_context_tokens, choice.budgets[-1] + 1)
    long = sum(len(prompt) >= shortest for prompt in prompts)
    if 2 * long < len(prompts):
        raise RecipeError(
            f"{long} of the {len(prompts)} asks have {shortest} tokens or more, which is where retrieval begins",
            expected="at least half of them",
            remedy="Give rows as long as the role's own, or lower min_context_tokens and `budgets`.",
        )
    role, points = sweep_budgets(choice, fier, choice.budgets, job)
    chosen = held_budget(role, points, choice.margin)
    recall = measure_recall(job.model, prompts[: choice.recall_rows], fier, choice.budgets)
    card = {
        "role": role,
        "asks": len(job.rows),
        "fier_budget": chosen.budget_tokens,
        "fier": {
            "points": [{**asdict(point), "change": list(point.change)} for point in points],
            "recall": [asdict(point) for point in recall],
        },
    }
    return fier.model_copy(update={"budget_tokens": chosen.budget_tokens}), card


METHOD = Method(settings=FierMethod, make=make, needs_data=lambda settings: settings.choose is not None, check=check)
