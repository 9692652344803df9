"""From a variant to what serves it: the engine and adapter it needs, both checked."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from ...agents.chat.chat_template import TemplateSettings
from ...agents.errors import AdapterError, AskRejectedError, UnknownVariantError, VariantError
from ...agents.messages import Ask
from ...agents.thinking import ThinkingTags
from ...specializers.checkpoints.self_check import KnownAnswer, read_self_check
from ...specializers.machine.number_types import NumberType, engine_number_type
from ...specializers.shelf.variant import EngineSpec, Variant, served_by
from ..settings.engine import EngineSettings

if TYPE_CHECKING:
    from ...specializers.adapters.semantic_map import SemanticMap

__all__ = ["EngineStart", "Resolve", "VariantTarget", "VariantTargets"]

Resolve = Callable[[str], tuple[Variant, Path]]


@dataclass(frozen=True)
class EngineStart:
    """What one engine of a pool is started with; `weights` is the checkpoint folder.

    `self_check` is what it must answer before it may serve (see `specializers.self_check`); `dtype_reason` says why it
    computes in `dtype`.
    """

    name: str
    weights: Path
    dtype: str
    adapters: bool
    settings: EngineSettings
    self_check: tuple[KnownAnswer, ...] = ()
    checkpoint: str = "base"
    dtype_reason: str = ""

    @property
    def computes(self) -> str:
        """On how many threads the engine computes and in which number type, with the reason for that."""
        threads = self.settings.thread_count
        dtype = NumberType(self.dtype, self.dtype_reason)
        return f"computes on {threads} thread{'s' * (threads > 1)} in {dtype}"


@dataclass(frozen=True)
class VariantTarget:
    """The engine that serves the asks of one variant, and the adapter they need there."""

    start: EngineStart
    variant: Variant | None = None
    adapter: Path | None = None
    semantic_map: SemanticMap | None = None

    def check_layout(self, ask: Ask) -> None:
        """Refuse an ask whose prompt has a later layout than the adapter was trained with.

        Raises: AdapterError.
        """
        variant = self.variant
        if self.adapter is None or variant is None or variant.prompt_layout >= ask.prompt_layout:
            return
        raise AdapterError(
            f"variant {variant.name!r} was trained with prompt layout {variant.prompt_layout}",
            expected=f"layout {ask.prompt_layout}, in which role {ask.role!r} asks",
            remedy="Make the variant again, from rows of this role that this version has rendered.",
        )

    def check_template(self, template: TemplateSettings) -> None:
        """Refuse an adapter that was trained with other arguments of the chat template, or other thinking tags of the
        user's own, than those of `template`, which it would be asked with.

        Raises: AdapterError.
        """
        variant = self.variant
        # One that was trained elsewhere does not say how.
        if self.adapter is None or variant is None or not variant.data:
            return
        if variant.thinking_tags not in (None, template.tags):
            tags = variant.thinking_tags.model_dump_json()
            raise AdapterError(
                f"variant {variant.name!r} was trained to think between {tags}",
                expected=f"the setting engine.thinking_tags to be that, not {_shown(template.tags)}",
                remedy=f"Add `--set 'engine.thinking_tags={tags}'`, or make it again with these.",
            )
        args = template.args
        if variant.chat_template_args == args:
            return
        raise AdapterError(
            f"variant {variant.name!r} was trained with the chat template arguments {variant.chat_template_args}",
            expected=f"those of the setting engine.chat_template_args, {dict(args)}",
            remedy="Set them to the variant's, or make it again with these.",
        )

    def intuition(self, ask: Ask) -> tuple[float, ...] | None:
        """The semantic vector of a run for a T-REX adapter: computed once per run, since every ask has the same task.

        Raises: AskRejectedError when the ask carries no task.
        """
        if self.semantic_map is None:
            return None
        if not ask.task:
            raise AskRejectedError(
                f"the ask of role {ask.role!r} at step {ask.step_path!r} carries no task",
                expected=f"the text of the run's input, which T-REX variant {ask.variant!r} turns into its intuition",
                remedy="Set Ask.task (task_text gives it from a run's input); runs of a session set it themselves.",
            )
        return self.semantic_map.intuition(ask.task)


class VariantTargets:
    """Finds the target of each variant once: its checkpoint, its adapter, and every check of both.

    `base` is the base checkpoint's folder; `resolve` turns a variant's name or content id into its record and folder.
    `adapters` names the checkpoints (`base`, or content ids) whose engines have LoRA layers, or is True for all and
    False for none. `adapter_paths` maps the content ids of the variants found so far to their adapters.
    """

    def __init__(
        self, base: Path, resolve: Resolve, settings: EngineSettings, adapters: bool | Collection[str]
    ) -> None:
        self._base = base
        self._resolve = resolve
        self._settings = settings
        self._adapters = adapters
        self._found: dict[str | None, VariantTarget] = {}
        self.adapter_paths: dict[str, Path] = {}

    async def find(self, name: str | None) -> VariantTarget:
        """The target of a variant by name or content id, None for the base; checked when it is first named.

        Raises: UnknownVariantError, VariantError, AdapterError.
        """
        target = self._found.get(name)
        if target is None:
            target = await self._find(name)
            target.check_template(self._settings.template)
            self._found[name] = target
        return target

    def known(self, name: str | None) -> VariantTarget | None:
        """The target of a variant that was found before."""
        return self._found.get(name)

    def name_of(self, adapter_id: str) -> str:
        """The name of a variant that was found, by its content id."""
        return next(t.variant.name for t in self._found.values() if t.variant and t.variant.id == adapter_id)

    async def _find(self, name: str | None) -> VariantTarget:
        if name is None:
            return VariantTarget(self._engine_start(EngineSpec(base=""), None, self._base))
        variant, folder = self._resolve(name)
        owner, weights = self._checkpoint(variant, folder)
        start = self._engine_start(variant.engine, owner, weights)
        if variant.ask.adapter is not None and not start.adapters:
            raise AdapterError(
                f"variant {variant.name!r} has an adapter, and the pool was opened without any",
                expected="variants without adapters",
                remedy="Name the variant in the assignment before the session opens.",
            )
        await anyio.to_thread.run_sync(self._check_variant, variant, folder, weights)
        if variant.ask.adapter is None:
            return VariantTarget(start, variant)
        adapter = self.adapter_paths[variant.id] = folder / "adapter"
        if variant.ask.kind is not None and variant.ask.kind.needs_intuition:
            return VariantTarget(start, variant, adapter, await anyio.to_thread.run_sync(_load_semantic_map, adapter))
        return VariantTarget(start, variant, adapter)

    def _checkpoint(self, variant: Variant, folder: Path) -> tuple[Variant | None, Path]:
        """The variant whose checkpoint this one uses (None for the base), and its folder."""
        if variant.engine.weights == "base":
            return None, self._base
        owner, place = variant, folder
        if variant.engine.weights != "own":
            try:
                owner, place = self._resolve(variant.engine.weights)
            except UnknownVariantError as error:
                raise VariantError(
                    f"variant {variant.name!r} stands on the weights of variant {variant.engine.weights}",
                    expected="that variant on the same shelf",
                    remedy="Copy its folder there too, or make it again from its recipe.",
                ) from error
        return owner, place / "weights"

    def _engine_start(self, spec: EngineSpec, owner: Variant | None, weights: Path) -> EngineStart:
        checkpoint = "base" if owner is None else owner.id
        adapters = self._adapters if isinstance(self._adapters, bool) else checkpoint in self._adapters
        # The name is for people and may be used again; the id keeps engines apart.
        name = "base" if owner is None else f"{owner.name}-{owner.id[:6]}"
        name = name if spec.dtype == "auto" else f"{name}-{spec.dtype}"
        # What it answers is known of the prompts that it was made with.
        told = owner is not None and owner.template == self._settings.template
        known = read_self_check(owner.card) if owner is not None and told else ()
        settings = self._settings
        if spec.fier is not None:
            name = f"{name}-fier{spec.fier.budget_tokens}"
            settings = settings.model_copy(update={"fier": spec.fier})
        computes = engine_number_type(weights, settings.dtype if spec.dtype == "auto" else spec.dtype)
        return EngineStart(
            name, weights, computes.dtype, adapters, settings, known, served_by(checkpoint, spec), computes.reason
        )

    def _check_variant(self, variant: Variant, folder: Path, weights: Path) -> None:
        """All checks of weights and adapter before an engine gets them (in a worker thread)."""
        from ...specializers.adapters.adapter_check import check_adapter, check_variant
        from ...specializers.shelf.base_model import check_weights

        if weights == self._base:
            check_variant(variant, folder, weights, slot_rank=self._settings.slot_rank)
            return
        check_weights(variant, weights, self._base)
        if variant.ask.adapter is not None:
            # Its adapter was made for these weights, whose shapes may differ from the base's.
            check_adapter(folder / "adapter", weights, slot_rank=self._settings.slot_rank)


def _shown(tags: ThinkingTags | None) -> str:
    return "unset, which reads them from the chat template" if tags is None else tags.model_dump_json()


def _load_semantic_map(adapter: Path) -> SemanticMap:
    from ...specializers.adapters.semantic_map import SemanticMap

    return SemanticMap.load(adapter)
