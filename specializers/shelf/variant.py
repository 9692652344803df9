"""A variant of the base model: what an engine is started with, what changes with each ask, and its lineage."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ...agents.thinking import ThinkingProfile
from .fier_settings import FierSettings

__all__ = ["AskSpec", "EngineSpec", "Variant", "content_id", "served_by"]

SCHEMA_VERSION = 1


class EngineSpec(BaseModel):
    """The engine half: fixed when an engine starts, so it decides which engine serves the variant.

    `weights` says where the checkpoint is: `base`, `own` (this variant's `weights/` folder; its content id cannot
    stand here, since it is a hash over this very record), or the content id of the ancestor that holds it.
    `attention: fier` reads the most promising tokens of a long context instead of all, as `fier` says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    weights: str = Field(default="base", pattern=r"^(base|own|[0-9a-f]{16})$")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attention: Literal["stock", "fier"] = "stock"
    # Variants without it keep the content ids they had before there was retrieval.
    fier: FierSettings | None = Field(default=None, exclude_if=lambda fier: fier is None)

    @model_validator(mode="after")
    def _retrieval_is_whole(self) -> Self:
        if (self.attention == "fier") != (self.fier is not None):
            raise ValueError(f"attention {self.attention!r} with fier: {self.fier}; `fier` goes with attention 'fier'")
        return self


class AskSpec(BaseModel):
    """The ask half: chosen per request, so switching it is the hot swap.

    `adapter` is the kind of adapter in the variant's `adapter/` folder, None for none; `rank` is the number of slot
    rows it needs: a LoRA's real rank, r1 + r1·r2 of a T-REX adapter (its router rides in the slot). `thinking` is how
    long the variant is made to think; it holds where neither the assignment nor the role says otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: Literal["lora", "trex"] | None = None
    rank: int = Field(default=0, ge=0)
    thinking: ThinkingProfile | None = None

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_said(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Variants keep the content ids they had before there was thinking.
        record: dict[str, Any] = dump(self)
        return record if self.thinking is not None else {k: v for k, v in record.items() if k != "thinking"}


class Variant(BaseModel):
    """The record of one variant folder, written as `variant.json`.

    `base` fingerprints the base checkpoint every variant descends from; `parent` is the content id this one
    was made from, None for the base itself; `data` fingerprints the training data; `card` holds what was
    measured. `id` is the content id: a hash of everything but the card and the name, weights included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    id: str
    name: str
    base: str
    parent: str | None = None
    recipe: dict[str, Any] = {}
    seed: int = 0
    data: str = ""
    prompt_layout: int
    engine: EngineSpec
    ask: AskSpec = AskSpec()
    files: dict[str, str] = {}
    card: dict[str, Any] = {}

    @property
    def checkpoint(self) -> str:
        """Which checkpoint an engine needs for it: `base`, or the content id of the variant that holds it."""
        return self.id if self.engine.weights == "own" else self.engine.weights

    @property
    def served_by(self) -> str:
        """Which engine serves it: its checkpoint, and how that engine attends where it is not stock."""
        return served_by(self.checkpoint, self.engine)


def served_by(checkpoint: str, engine: EngineSpec) -> str:
    """What tells apart the engines of one checkpoint; `checkpoint` is `base` or a content id."""
    return checkpoint if engine.fier is None else f"{checkpoint}+{engine.fier.label}"


def content_id(record: dict[str, Any]) -> str:
    """Name of a variant by content: 16 hex digits over its record without `id`, `name` and `card`.

    `record["files"]` maps each file of the folder to its SHA-256, so the weights are covered.
    """
    content = {k: v for k, v in record.items() if k not in ("id", "name", "card")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
