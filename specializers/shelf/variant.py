"""A variant of the base model: what an engine is started with, what changes with each ask, and its lineage."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, JsonValue, SerializerFunctionWrapHandler, model_serializer, model_validator

from ...agents.chat.chat_template import TemplateSettings
from ...agents.content_hash import content_hash
from ...agents.frozen_model import FrozenModel
from ...agents.thinking import ThinkingProfile, ThinkingTags
from .adapter_kinds import ADAPTER_KINDS, AdapterKind, AdapterName
from .fier_settings import FierSettings

__all__ = ["AskSpec", "EngineSpec", "Variant", "content_id", "served_by"]

SCHEMA_VERSION = 1


class EngineSpec(FrozenModel):
    """The engine half: fixed when an engine starts, so it decides which engine serves the variant."""

    base: str
    """Fingerprint of the base checkpoint."""

    weights: str = Field(default="base", pattern=r"^(base|own|[0-9a-f]{16})$")
    """Where the checkpoint is: `base`, `own` (this variant's `weights/` folder; its content id cannot stand here, being
    a hash over this very record), or the content id of the ancestor that holds it."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number type that the engine computes in."""

    attention: Literal["stock", "fier"] = "stock"
    """`stock` reads the whole context, `fier` the tokens that retrieval chooses."""

    # Variants without it keep the content ids they had before there was retrieval.
    fier: FierSettings | None = Field(default=None, exclude_if=lambda fier: fier is None)
    """Settings of `attention: fier`."""

    @model_validator(mode="after")
    def _retrieval_is_whole(self) -> Self:
        if (self.attention == "fier") != (self.fier is not None):
            raise ValueError(f"attention {self.attention!r} with fier: {self.fier}; `fier` goes with attention 'fier'")
        return self


class AskSpec(FrozenModel):
    """The ask half: chosen for each ask, so changing it is the hot swap."""

    adapter: AdapterName | None = None
    """Kind of adapter in the variant's `adapter/` folder. None for none."""

    rank: int = Field(default=0, ge=0)
    """Rows of a slot that the adapter needs: a LoRA's rank, or r1 + r1·r2 of a T-REX adapter, whose router rides in the
    slot."""

    thinking: ThinkingProfile | None = None
    """How long the variant thinks, where neither the assignment nor the role says."""

    @property
    def kind(self) -> AdapterKind | None:
        """The properties of its kind of adapter, None without one."""
        return None if self.adapter is None else ADAPTER_KINDS[self.adapter]

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_said(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Variants keep the content ids they had before there was thinking.
        record: dict[str, Any] = dump(self)
        return record if self.thinking is not None else {k: v for k, v in record.items() if k != "thinking"}


class Variant(FrozenModel):
    """The record of one variant folder, written as `variant.json`."""

    schema_version: int = SCHEMA_VERSION
    """Version of this record's layout."""

    id: str
    """Content id: a hash of everything but name and card, weights included."""

    name: str
    """What people call it."""

    base: str
    """Fingerprint of the base checkpoint that it descends from."""

    parent: str | None = None
    """Content id of what it was made from. None for the base itself."""

    recipe: dict[str, Any] = {}
    """The recipe it was made by."""

    seed: int = 0
    """The recipe's seed."""

    data: str = ""
    """Fingerprint of the training data, empty where there was none."""

    prompt_layout: int
    """Version of the prompt layout that it was made for."""

    # Variants without any keep the content ids they had before there were arguments.
    chat_template_args: dict[str, JsonValue] = Field(default={}, exclude_if=lambda args: not args)
    """Arguments of the chat template that it was made with."""

    thinking_tags: ThinkingTags | None = Field(default=None, exclude_if=lambda tags: tags is None)
    """The tags it was made with, where they were set (`engine.thinking_tags`). None: those of the chat template."""

    engine: EngineSpec
    """The engine half."""

    ask: AskSpec = AskSpec()
    """The ask half."""

    files: dict[str, str] = {}
    """File of the folder → its SHA-256."""

    card: dict[str, Any] = {}
    """What was measured while it was made."""

    @property
    def template(self) -> TemplateSettings:
        """How the chat template was written when it was made."""
        return TemplateSettings(args=self.chat_template_args, tags=self.thinking_tags)

    @property
    def checkpoint(self) -> str:
        """Which checkpoint an engine needs for it: `base`, or the content id of the variant that holds it."""
        return self.id if self.engine.weights == "own" else self.engine.weights

    @property
    def served_by(self) -> str:
        """Which engine serves it: its checkpoint, and how that engine attends where it is not stock."""
        return served_by(self.checkpoint, self.engine)


def served_by(checkpoint: str, engine: EngineSpec) -> str:
    """The identity of an engine among those of one checkpoint; `checkpoint` is `base` or a content id."""
    return checkpoint if engine.fier is None else f"{checkpoint}+{engine.fier.label}"


def content_id(record: dict[str, Any]) -> str:
    """Name of a variant by content: 16 hex digits over its record without `id`, `name` and `card`.

    `record["files"]` maps each file of the folder to its SHA-256, so the weights are covered.
    """
    content = {k: v for k, v in record.items() if k not in ("id", "name", "card")}
    return content_hash(content, compact=True)
