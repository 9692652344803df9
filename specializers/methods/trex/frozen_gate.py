"""T-REX as plain LoRA, for engines that cannot run its gate: one frozen gate for each cluster of tasks.

With its gate held fixed a T-REX layer is a LoRA of rank r1 (`gate_projection.py`). The gates are taken from some rows
of each cluster; what is lost is how a gate moves from token to token, and that is measured on rows held out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ....agents.chat.chat_template import TemplateSettings
from ....agents.errors import RecipeError
from ....agents.frozen_model import FrozenModel
from ....agents.traffic import TrafficRow
from ...adapters.adapter_files import PEFT_PREFIX
from ...adapters.adapter_writing import write_lora
from ...adapters.logit_error import LogitError, LogitErrorMeter
from ...adapters.semantic_map import SemanticMap
from ...checkpoints.attention import open_model
from ...checkpoints.opened_by_transformers import open_tokenizer
from ...training.batches import EncodedRow, encode_rows, pad_token
from .gate_projection import GateMoments, Projection, frozen_factors
from .layer import TrexLinear, expert_gate

__all__ = [
    "AnswerLoss",
    "FrozenCluster",
    "FrozenGateSettings",
    "cluster_rows",
    "freeze_gate",
]

_PLAIN = TemplateSettings()


class FrozenGateSettings(FrozenModel):
    """How T-REX is exported as plain LoRA, one for each cluster of tasks. A cluster with less than two rows is left
    out."""

    calibration_rows: int = Field(default=32, ge=1)
    """Rows of a cluster that set its gate, at most."""

    held_out_rows: int = Field(default=16, ge=1)
    """Rows of a cluster that measure what is lost, at most. They are never more than a third of it."""

    batch_rows: int = Field(default=8, ge=1)
    """Rows that go through the model at once."""

    max_row_tokens: int = Field(default=1024, ge=8)
    """Most tokens of one row. A longer one is an error."""

    seed: int = Field(default=0, ge=0)
    """Seed of the draw of rows."""

    projection: Projection = "least_squares"
    """How a gate that moves becomes a fixed one: `least_squares` is the one nearest in what it does, `mean` its mean
    over tokens."""


@dataclass(frozen=True)
class AnswerLoss:
    """Cross-entropy of the held-out answers in nats per token: with T-REX's own gate, frozen, and on the bare base."""

    token_gate: float
    frozen: float
    base: float


@dataclass(frozen=True)
class FrozenCluster:
    """One exported adapter: its folder, its cluster, how many rows made and measured it, and what it loses."""

    folder: Path
    cluster: int
    rank: int
    calibration_rows: int
    held_out_rows: int
    error: LogitError
    loss: AnswerLoss


def cluster_rows(rows: Sequence[TrafficRow], semantic_map: SemanticMap) -> dict[int, list[TrafficRow]]:
    """Rows by the cluster their task is most like, in order of cluster.

    Raises: RecipeError when a row has no task.
    """
    found: dict[int, list[TrafficRow]] = {}
    for number, row in enumerate(rows, 1):
        if not row.task:
            raise RecipeError(
                f"row {number} has no task",
                expected="the text of its run's input, which says which cluster it is of",
                remedy="Export the traffic again with this version, or set task in the program's rows.",
            )
        c = semantic_map.intuition(row.task)
        found.setdefault(max(range(len(c)), key=c.__getitem__), []).append(row)
    return dict(sorted(found.items()))


def freeze_gate(
    adapter: Path,
    base: Path,
    rows: Sequence[TrafficRow],
    out: Path,
    *,
    settings: FrozenGateSettings | None = None,
    template: TemplateSettings = _PLAIN,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[FrozenCluster]:
    """Write the T-REX adapter's frozen gates as LoRA folders `out/cluster-NN`, one at a time, each measured.

    `base` is the checkpoint the adapter is for, `template` how its chat template is written. The loss is measured by
    logits at the answer tokens of held-out rows, teacher-forced, in float32, with the written bfloat16 file.
    `on_progress` gets clusters done and in all.
    Raises: RecipeError when no cluster has enough rows or a row has no task, TrainingError for rows too long.
    """
    chosen = settings or FrozenGateSettings()
    clusters = {k: members for k, members in cluster_rows(rows, SemanticMap.load(adapter)).items() if len(members) >= 2}
    if not clusters:
        raise RecipeError(
            f"none of the {len(rows)} rows shares its cluster with another",
            expected="at least two rows of a cluster, one to set its gate and one to measure it",
            remedy="Give more rows: those of the recipe the adapter was made from, or its traffic.",
        )
    tokenizer = open_tokenizer(base)
    pad = pad_token(tokenizer)
    models = _Models(adapter, base)
    rng = random.Random(chosen.seed)
    for done, (k, members) in enumerate(clusters.items(), 1):
        drawn = rng.sample(members, len(members))
        held_out = min(chosen.held_out_rows, max(1, len(drawn) // 3))
        encoded = encode_rows(
            drawn[: held_out + chosen.calibration_rows],
            tokenizer,
            max_row_tokens=chosen.max_row_tokens,
            intuition=models.semantic_map.intuition,
            template=template,
        )
        measured, calibration = encoded[:held_out], encoded[held_out:]
        folder = out / f"cluster-{k:02d}"
        factors = models.frozen(list(_batches(calibration, chosen.batch_rows, pad)), chosen.projection)
        rank = next(iter(factors.values()))[0].shape[0]
        write_lora(folder, factors, rank=rank, base=base, bf16=True)
        error, loss = models.measure(folder, list(_batches(measured, chosen.batch_rows, pad)))
        yield FrozenCluster(folder, k, rank, len(calibration), held_out, error, loss)
        if on_progress is not None:
            on_progress(done, len(clusters))


@dataclass(frozen=True)
class _Batch:
    """Rows padded on the right: tokens and mask [rows, tokens], c [rows, experts], and where the answers are."""

    tokens: torch.Tensor
    mask: torch.Tensor
    intuition: torch.Tensor
    answers: torch.Tensor


class _Models:
    """The T-REX model, and a base of its own for the LoRAs: peft cannot hold both kinds on one model."""

    def __init__(self, adapter: Path, base: Path) -> None:
        from peft import PeftModel

        from .tuner import register_trex

        register_trex()
        self._base = base
        self.trex = PeftModel.from_pretrained(open_model(base, dtype=torch.float32), adapter).eval()
        self.semantic_map: SemanticMap = self.trex.base_model.semantic_map()
        self._layers = {
            name.removeprefix(PEFT_PREFIX): layer
            for name, layer in self.trex.named_modules()
            if isinstance(layer, TrexLinear)
        }
        self._lora: Any = None

    def frozen(self, batches: Sequence[_Batch], projection: Projection) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """LoRA halves of every layer, its gate frozen for these rows' tokens."""
        moments = {name: GateMoments(layer.trex_shape["default"]) for name, layer in self._layers.items()}
        mask, c = torch.zeros(()), torch.zeros(())

        def watch(name: str) -> Callable[[Any, Any], None]:
            def add(layer: TrexLinear, inputs: tuple[torch.Tensor, ...]) -> None:
                x, shape = inputs[0][mask].float(), layer.trex_shape["default"]
                logits, omega = layer.lora_router["default"](x), layer.trex_omega["default"]
                gate = expert_gate(logits, c, omega, shape)
                moments[name].add(layer.lora_A["default"](x), gate)

            return add

        hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in self._layers.items()]
        try:
            with torch.no_grad():
                for batch in batches:
                    mask = batch.mask.bool()
                    c = batch.intuition[:, None].expand(-1, mask.shape[1], -1)[mask]
                    self.trex(input_ids=batch.tokens, attention_mask=batch.mask, intuition=batch.intuition)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            name: frozen_factors(
                layer.lora_A["default"].weight.detach(),
                layer.lora_B["default"].weight.detach(),
                moments[name].gate(projection).float(),
                layer.trex_gamma["default"].detach(),
            )
            for name, layer in self._layers.items()
        }

    def measure(self, folder: Path, batches: Sequence[_Batch]) -> tuple[LogitError, AnswerLoss]:
        """Compare a LoRA folder with the T-REX adapter at the answer tokens of these rows."""
        lora = self._with_lora(folder)
        meter = LogitErrorMeter()
        losses = torch.zeros(3, dtype=torch.float64)
        tokens = 0
        for batch in batches:
            inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
            at, targets = batch.answers[:, 1:], batch.tokens[:, 1:][batch.answers[:, 1:]]

            def logits(model: Any, at: torch.Tensor = at, **more: Any) -> torch.Tensor:
                with torch.no_grad():
                    output: torch.Tensor = model(**more).logits[:, :-1][at]
                return output

            original = logits(self.trex, **inputs, intuition=batch.intuition)
            frozen = logits(lora, **inputs)
            with lora.disable_adapter():
                bare = logits(lora, **inputs)
            meter.add(original, frozen, bare)
            each = [torch.nn.functional.cross_entropy(x, targets, reduction="sum") for x in (original, frozen, bare)]
            losses += torch.stack(each).double()
            tokens += len(targets)
        token_gate, frozen_loss, base_loss = (round(float(x), 5) for x in losses / tokens)
        return meter.result(), AnswerLoss(token_gate, frozen_loss, base_loss)

    def _with_lora(self, folder: Path) -> Any:
        from peft import PeftModel

        name = folder.name
        if self._lora is None:
            self._lora = PeftModel.from_pretrained(
                open_model(self._base, dtype=torch.float32), folder, adapter_name=name
            ).eval()
        else:
            before = self._lora.active_adapter
            self._lora.load_adapter(folder, name)
            self._lora.set_adapter(name)
            self._lora.delete_adapter(before)
        return self._lora


def _batches(rows: Sequence[EncodedRow], batch_rows: int, pad: int) -> Iterator[_Batch]:
    near = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(near), batch_rows):
        part = near[start : start + batch_rows]
        width = len(part[-1].tokens)
        tokens = torch.full((len(part), width), pad)
        mask = torch.zeros((len(part), width), dtype=torch.long)
        answers = torch.zeros((len(part), width), dtype=torch.bool)
        for i, row in enumerate(part):
            tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
            mask[i, : len(row.tokens)] = 1
            answers[i, row.prompt_tokens : len(row.tokens)] = True
        yield _Batch(tokens, mask, torch.tensor([row.intuition for row in part]), answers)
