"""The plain training loop: answer tokens only, batches of like length, resumable at any kill.

torch is imported inside the functions, so that settings and recipes load without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from pydantic import Field

from ...agents.errors import TrainingError
from ...agents.frozen_model import FrozenModel
from .batches import EncodedRow, plan_batches
from .checkpoint import TrainingCheckpoint
from .objective import Objective, Placed
from .speed import give_back_freed_memory, kept_pages

if TYPE_CHECKING:
    import torch

__all__ = ["Progress", "TrainingSettings", "learning_rate_at", "train"]


class TrainingSettings(FrozenModel):
    """Settings that every trained method shares.

    >>> TrainingSettings(steps=600, learning_rate=5e-4).schedule
    'cosine'
    """

    steps: int = Field(default=300, ge=1)
    """Optimiser steps."""

    batch_rows: int = Field(default=16, ge=1)
    """Rows of one step."""

    learning_rate: float = Field(default=1e-3, gt=0.0)
    """Highest learning rate, reached after `warmup_steps`."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0 after that; `constant` keeps it."""

    warmup_steps: int = Field(default=20, ge=0)
    """Steps in which the learning rate rises to its highest."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Weight decay of the optimiser (AdamW)."""

    clip_norm: float = Field(default=1.0, gt=0.0)
    """Largest norm of a step's gradient; larger ones are scaled down to it."""

    max_row_tokens: int = Field(default=1024, ge=8)
    """Most tokens of one row. A longer one is an error."""

    # Memory, not identity: a variant made in other passes is the same variant.
    pass_tokens: int = Field(default=512, ge=1, exclude=True)
    """Most tokens that go through the model at once. A larger batch goes in parts whose gradients add up, which bounds
    memory. The loss is the same, up to rounding and dropout's draws."""

    checkpoint_steps: int = Field(default=25, ge=1)
    """Steps between two checkpoints, from which a killed training goes on."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the wide matrix products: `auto` is what `metier doctor --measure` found to be the fastest here; without
    it, bfloat16 where the processor multiplies it natively (2x faster), else float32. What is trained stays float32,
    and so does a CPU's residual stream."""


@dataclass(frozen=True)
class Progress:
    """Where a method is: the step it has done, and the `value` of what it measures there.

    `measured` names that value: by default the loss, in nats per answer token. `eta_s` is an estimate in seconds,
    None where a method cannot say.
    """

    step: int
    steps: int
    value: float
    measured: str = "loss"
    eta_s: float | None = None


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """Learning rate of a step, counted from 0."""
    warmup = min(settings.warmup_steps, settings.steps - 1)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, settings.steps - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return settings.learning_rate * factor[settings.schedule]


@kept_pages()
def train(
    model: Any,
    rows: Sequence[EncodedRow],
    settings: TrainingSettings,
    *,
    seed: int,
    checkpoint: Path,
    job: str,
    rate_factor: Callable[[str], float] | None = None,
    objective: Objective | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **placed: Unpack[Placed],
) -> list[dict[str, float]]:
    """Train the parameters of `model` that require gradients, and return the log: one entry per step.

    `rate_factor` gives a parameter's learning rate, by its name, as a multiple of the scheduled one; parameters of
    one factor are a group, and each group's gradient is clipped by itself. `objective` is what to descend on, by
    default the answers' cross-entropy.
    `checkpoint` is a safetensors file, replaced whole every `checkpoint_steps`; when it exists and was written
    by the same `job` (a fingerprint of recipe, data and base), training goes on from it and ends, on CPU, with
    the weights an uninterrupted run gives: batches and random states depend only on seed and step.
    Raises: TrainingError when the loss is not finite (the checkpoint before it stays), or the checkpoint is of
    another job.
    """
    import torch

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: dict[float, list[torch.Tensor]] = {}
    for name, parameter in trained.items():
        groups.setdefault(1.0 if rate_factor is None else rate_factor(name), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group, "factor": factor} for factor, group in groups.items()],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.98),
    )
    if objective is None:
        objective = Objective(model, **placed)
    objective.pass_tokens = settings.pass_tokens
    kept = TrainingCheckpoint(checkpoint, job, trained, optimizer, objective.state)
    log = kept.load()
    plan = plan_batches(
        [len(row.tokens) for row in rows], batch_rows=settings.batch_rows, steps=settings.steps, seed=seed
    )
    began, first = time.monotonic(), len(log)
    model.train()
    for step in range(first, settings.steps):
        torch.manual_seed(seed * 1_000_003 + step)
        rate = learning_rate_at(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.zero_grad(set_to_none=True)
        measured = objective.add_gradients([rows[i] for i in plan[step]], step)
        loss = measured["loss"]
        norms = [torch.nn.utils.clip_grad_norm_(group, settings.clip_norm).item() for group in groups.values()]
        if not all(map(math.isfinite, [*measured.values(), *norms])):
            raise TrainingError(
                f"step {step + 1} of {settings.steps}: loss {loss}, gradient norm {norms[0]}",
                expected="finite numbers",
                remedy=f"Lower learning_rate={settings.learning_rate} or raise warmup_steps; "
                f"the checkpoint before this step is kept.",
            )
        optimizer.step()
        measured |= objective.after_step(step)
        entry = {name: round(value, 6) for name, value in measured.items()}
        log.append({"step": step + 1, **entry, "learning_rate": round(rate, 9)})
        if (step + 1) % settings.checkpoint_steps == 0 or step + 1 == settings.steps:
            kept.save(log)
        if on_progress is not None:
            per_step = (time.monotonic() - began) / (step + 1 - first)
            on_progress(Progress(step + 1, settings.steps, loss, eta_s=per_step * (settings.steps - step - 1)))
    optimizer.zero_grad(set_to_none=True)
    give_back_freed_memory()
    return log
