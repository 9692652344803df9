"""T-REX as a PEFT method: `get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained` and a Trainer know it.

    from metier.specializers.methods.trex.tuner import TrexConfig   # importing it registers the method

    model = get_peft_model(base, TrexConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.set_semantic_map(SemanticMap.fit(texts, k=32, seed=0))
    c = torch.tensor([model.semantic_map().intuition(text) for text in texts_of_the_batch])
    model(input_ids=tokens, intuition=c).logits     # or, around anything:  with model.intuition(c): ...

c has one row per sequence of the batch and is never kept: a forward without it is an error. A Trainer passes what its
collator puts under "intuition"; set `remove_unused_columns=False`, or it drops the column.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ....agents.errors import AdapterError, RecipeError
from ....agents.prompts import TASK_TEXT_RULE
from ...adapters.semantic_map import CENTER_KEY, CENTROIDS_KEY, SemanticMap
from ...adapters.text_embedding import DEFAULT_EMBEDDING, TextEmbedding
from ...adapters.trex_shape import K_TASK, R1, R2, TREX, TREX_FORMAT, TrexShape, check_format
from .layer import Intuition, TrexLinear, ZeroIntuition, intuition_scope
from .peft_registration import register_tuner

__all__ = ["TrexConfig", "TrexModel", "register_trex"]

_BLOCK = ("r1", "r2", "k_tok", "k_task", "embed_id", "prompt_rule")


@dataclass
class TrexConfig(PeftConfig):  # type: ignore[misc]
    """Settings of a T-REX adapter; on disk, those a server needs are one block `trex`.

    r1 and r2 give r1·r2 rank-one experts. `k_tok` (r1·r2 when None) and `k_task` weigh token router and intuition;
    `k_task` 0 leaves the intuition out, in training and in serving. `router_init_std` 0 is the released start, at which
    only the intuition makes the columns of B differ. `target_modules` as in PEFT's LoRA.
    Raises: RecipeError for sizes below one, or negative weights.
    """

    r1: int = R1
    r2: int = R2
    k_tok: float | None = None
    k_task: float = K_TASK
    router_init_std: float = 0.02
    embed_id: str = DEFAULT_EMBEDDING
    prompt_rule: str = TASK_TEXT_RULE
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    trex: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(TREX)
        if self.trex is not None:
            check_format("the adapter", self.trex)
            for name in _BLOCK:
                if name in self.trex:
                    setattr(self, name, self.trex[name])
            self.trex = None
        if self.r1 < 1 or self.r2 < 1 or self.k_task < 0 or (self.k_tok is not None and self.k_tok < 0):
            raise RecipeError(
                f"r1={self.r1}, r2={self.r2}, k_tok={self.k_tok}, k_task={self.k_task}",
                expected="r1 and r2 of at least 1, weights of at least 0",
            )
        shape = self.shape
        self.k_tok, self.k_task = shape.k_tok, shape.k_task
        if isinstance(self.target_modules, list):
            self.target_modules = cast(Any, set(self.target_modules))
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = cast(Any, set(self.exclude_modules))

    @property
    def shape(self) -> TrexShape:
        """Sizes and constants of the adapter's layers."""
        return TrexShape.released(self.r1, self.r2, k_tok=self.k_tok, k_task=self.k_task)

    def to_dict(self) -> dict[str, Any]:
        """Settings as they are on disk."""
        fields = asdict(self)
        block = {name: fields.pop(name) for name in _BLOCK}
        return {**fields, "trex": {"format": TREX_FORMAT, **block}}


class TrexModel(BaseTuner):  # type: ignore[misc]
    """A model whose target linear layers are T-REX layers, and the semantic map each adapter is served with."""

    prefix: str = "trex_"
    tuner_layer_cls = TrexLinear
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(model, config, adapter_name, **kwargs)
        self.trex_centroids = BufferDict(persistent=True)
        self.trex_center = BufferDict(persistent=True)
        self._blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        # PeftModel.forward without a task type hands its keywords to the bare model, which does not know this one.
        self.model.register_forward_pre_hook(_drop_intuition, with_kwargs=True)

    @contextmanager
    def intuition(self, c: Intuition) -> Iterator[None]:
        """Run what is inside the block with c [rows, r1·r2]; the innermost block counts."""
        with _recomputed_with(c, self._blocks), intuition_scope(c):
            yield

    @contextmanager
    def without_intuition(self) -> Iterator[None]:
        """Run what is inside the block with c = 0, whatever its batch: the gate is then the token router alone."""
        with self.intuition(ZeroIntuition()):
            yield

    def forward(self, *args: Any, intuition: Intuition | None = None, **kwargs: Any) -> Any:
        """The wrapped model's forward, with c as a keyword."""
        if intuition is None:
            return self.model(*args, **kwargs)
        with self.intuition(intuition):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, intuition: Intuition | None = None, **kwargs: Any) -> Any:
        """The wrapped model's generate, with c as a keyword: one row per sequence, for every token of it."""
        if intuition is None:
            return self.model.generate(*args, **kwargs)
        with self.intuition(intuition):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PeftModel around forward and generate, with their keywords."""
        if kwargs.get("intuition") is None:
            yield
        else:
            with self.intuition(kwargs["intuition"]):
                yield

    def set_semantic_map(self, semantic_map: SemanticMap, adapter_name: str | None = None) -> None:
        """Say which map this adapter's c comes from; it is saved with the adapter.

        Raises: AdapterError when the map has another number of clusters than the adapter has experts.
        """
        name = adapter_name or self._active_name()
        config, clusters = self.peft_config[name], len(semantic_map.centroids)
        if clusters != config.shape.experts:
            raise AdapterError(
                f"the semantic map has {clusters} clusters",
                expected=f"one per expert, r1·r2 = {config.shape.experts}",
                remedy="Fit it with k = r1·r2.",
            )
        config.embed_id = semantic_map.embed_id
        self.trex_centroids[name] = torch.tensor(semantic_map.centroids)
        self.trex_center[name] = torch.tensor(semantic_map.center)

    def semantic_map(self, adapter_name: str | None = None, embed: TextEmbedding | None = None) -> SemanticMap:
        """The map this adapter's c comes from; raises AdapterError when it has none yet."""
        name = adapter_name or self._active_name()
        _check_has_map(self, name)
        centroids, center = (buffers[name].float().cpu().numpy() for buffers in (self.trex_centroids, self.trex_center))
        return SemanticMap(centroids, center, self.peft_config[name].embed_id, embed)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its map."""
        super().delete_adapter(adapter_name)
        for buffers in (self.trex_centroids, self.trex_center):
            if adapter_name in buffers:
                del buffers[adapter_name]

    def _active_name(self) -> str:
        (name,) = self.active_adapters
        return str(name)

    def _create_and_replace(
        self,
        config: TrexConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_kwargs: Any,
    ) -> None:
        if isinstance(target, TrexLinear):
            target.update_layer(adapter_name, config.shape, config.router_init_std)
        elif isinstance(target, nn.Linear):
            layer = TrexLinear(target, adapter_name, config.shape, config.router_init_std)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        else:
            raise RecipeError(
                f"target {current_key!r} is {type(target).__name__}",
                expected="a torch.nn.Linear",
                remedy="Leave it out of target_modules.",
            )

    # -- the file: see the names of PEFT's own hooks ---------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: list[str]
    ) -> dict[str, torch.Tensor]:
        for tuner in _tuners(model):
            _check_has_map(tuner, adapter_name)
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {key: value.float() if ".trex_" in key else value for key, value in tensors.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        name = key.rpartition(".")[2]
        return name if name in (CENTROIDS_KEY, CENTER_KEY) else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any
    ) -> dict[str, torch.Tensor]:
        for tuner in _tuners(model):
            for key, buffers in ((CENTROIDS_KEY, tuner.trex_centroids), (CENTER_KEY, tuner.trex_center)):
                if key in state_dict:
                    buffers[adapter_name] = torch.zeros(state_dict[key].shape)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_tensors(model, config, adapter_name, remapped)
        return cast(dict[str, torch.Tensor], remapped)


def register_trex() -> None:
    """Make PEFT know `peft_type: TREX`; importing this file calls it, and calling it again does nothing.

    Raises: VariantError when PEFT is not as this was written for.
    """
    register_tuner(TREX, TrexConfig, TrexModel)


def _drop_intuition(_model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {key: value for key, value in kwargs.items() if key != "intuition"}


@contextmanager
def _recomputed_with(c: Intuition, blocks: list[Any]) -> Iterator[None]:
    """Let gradient checkpointing, which runs blocks again in the backward pass, run them with the same c."""
    checkpointed = [block for block in blocks if block.gradient_checkpointing]
    before = [block._gradient_checkpointing_func for block in checkpointed]
    for block, checkpoint in zip(checkpointed, before, strict=True):
        block._gradient_checkpointing_func = partial(_checkpoint_with, checkpoint, c)
    try:
        yield
    finally:
        for block, checkpoint in zip(checkpointed, before, strict=True):
            block._gradient_checkpointing_func = checkpoint


def _checkpoint_with(checkpoint: Any, c: Intuition, block: Any, *args: Any) -> Any:
    def run(*inner: Any) -> Any:
        with intuition_scope(c):
            return block(*inner)

    return checkpoint(run, *args)


def _tuners(model: nn.Module) -> list[TrexModel]:
    return [module for module in model.modules() if isinstance(module, TrexModel)]


def _check_has_map(tuner: TrexModel, adapter_name: str) -> None:
    if adapter_name not in tuner.trex_centroids:
        raise AdapterError(
            f"T-REX adapter {adapter_name!r} has no semantic map",
            expected="the map its intuition comes from",
            remedy="Call model.set_semantic_map(SemanticMap.fit(texts, k=r1 * r2, seed=...)).",
        )


def _check_tensors(model: nn.Module, config: TrexConfig, adapter_name: str, found: dict[str, torch.Tensor]) -> None:
    """PEFT itself would load what matches and ignore the rest without a word."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, TrexLinear) and adapter_name in layer.trex_shape:
            for part, expected in config.shape.layer_shapes(layer.in_features, layer.out_features).items():
                parameter, dot, weight = part.partition(".")
                wanted[f"{name}.{parameter}.{adapter_name}{dot}{weight}"] = expected
    remedy = "Copy the adapter again, or make it again from its recipe."
    if missing := sorted(wanted.keys() - found.keys()):
        raise AdapterError(f"the adapter lacks {missing[0]}", expected=f"all {len(wanted)} tensors", remedy=remedy)
    centroids = next((value for key, value in found.items() if CENTROIDS_KEY in key), None)
    center = next((value for key, value in found.items() if CENTER_KEY in key), None)
    for key, value in found.items():
        if CENTROIDS_KEY in key or CENTER_KEY in key:
            continue
        if key not in wanted:
            raise AdapterError(f"the adapter has {key}", expected="tensors of layers it targets only", remedy=remedy)
        if tuple(value.shape) != wanted[key]:
            raise AdapterError(f"{key} has shape {list(value.shape)}", expected=str(list(wanted[key])), remedy=remedy)
    if centroids is None or center is None or centroids.shape != (config.shape.experts, *center.shape):
        shapes = [None if t is None else list(t.shape) for t in (centroids, center)]
        raise AdapterError(
            f"the adapter has {CENTROIDS_KEY} and {CENTER_KEY} of shapes {shapes[0]} and {shapes[1]}",
            expected=f"[{config.shape.experts}, e] and [e]",
            remedy=remedy,
        )


register_trex()
