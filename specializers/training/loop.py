"""The plain training loop: answer tokens only, batches of like length, resumable at any kill.

torch is imported inside the functions, so that settings and recipes load without it.
"""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...agents.errors import TrainingError
from ...agents.frozen_model import FrozenModel
from ...agents.whole_files import whole_file
from .batches import EncodedRow, passes, plan_batches, shared_start
from .speed import kept_pages

if TYPE_CHECKING:
    import torch

__all__ = [
    "Objective",
    "Progress",
    "TrainingSettings",
    "answer_loss",
    "give_back_freed_memory",
    "learning_rate_at",
    "multiplies_bfloat16",
    "train",
]


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
    """Type of the wide matrix products: `auto` is bfloat16 where the processor multiplies it natively (2x faster), else
    float32. What is trained stays float32, and so does a CPU's residual stream."""


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


def answer_loss(model: Any, rows: Sequence[EncodedRow], *, pad_token: int, device: str = "cpu") -> torch.Tensor:
    """Mean cross-entropy over the answer tokens of a batch, in nats; a scalar that can be differentiated.

    What all prompts start with is computed once, and its keys and values are shared by the rows (gradients add
    up): the same loss for a third less work on prompts of one role. Rows are padded between that start and
    their rest, so that answers end in the same column, and logits are needed for the last columns only.
    """
    import torch

    shared = shared_start(rows)
    rest = [row.tokens[shared:] for row in rows]
    width = max(map(len, rest))
    keep = max(len(row.tokens) - row.prompt_tokens for row in rows)
    tokens = torch.full((len(rows), width), pad_token)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), keep), -100)
    for i, (row, tail) in enumerate(zip(rows, rest, strict=True)):
        tokens[i, width - len(tail) :] = torch.tensor(tail)
        mask[i, width - len(tail) :] = 1
        answer = row.tokens[row.prompt_tokens :]
        labels[i, keep - len(answer) :] = torch.tensor(answer)
    positions = (shared + mask.cumsum(1) - 1).clamp(min=0)
    told = {}
    if rows[0].intuition is not None:
        told["intuition"] = torch.tensor([row.intuition for row in rows], device=device)
    cache = None
    if shared:
        start = torch.tensor([rows[0].tokens[:shared]], device=device)
        of_one = {name: values[:1] for name, values in told.items()}
        cache = model(input_ids=start, use_cache=True, logits_to_keep=1, **of_one).past_key_values
        cache.batch_repeat_interleave(len(rows))
        mask = torch.cat([torch.ones((len(rows), shared), dtype=torch.long), mask], dim=1)
    output = model(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        logits_to_keep=min(keep + 1, width),
        use_cache=bool(shared),
        **told,
    )
    logits = output.logits[:, -keep - 1 : -1].float()  # [rows, keep, vocabulary]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.to(device).flatten(), ignore_index=-100)


class Objective:
    """What each step descends on: here the mean cross-entropy of the answers; methods that want more override it.

    `state` holds tensors, of fixed shapes, that are saved with every checkpoint and restored in place; `pass_tokens`
    is the settings' own, set by `train`.
    """

    def __init__(self, model: Any, *, pad_token: int, device: str = "cpu", autocast: bool = False) -> None:
        self.model = model
        self.pad_token = pad_token
        self.device = device
        self.autocast = autocast
        self.state: dict[str, torch.Tensor] = {}
        self.pass_tokens: int | None = None

    def loss(self, rows: Sequence[EncodedRow]) -> torch.Tensor:
        """`answer_loss` of the model as it is now, in the precision training asked for."""
        import torch

        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            return answer_loss(self.model, rows, pad_token=self.pad_token, device=self.device)

    def add_gradients(self, rows: Sequence[EncodedRow], step: int) -> dict[str, float]:
        """Add this step's gradients to those of the parameters; returns what the log keeps, `loss` among it."""
        return {"loss": self.add_answer_gradients(rows)}

    def add_answer_gradients(self, rows: Sequence[EncodedRow], weight: float = 1.0) -> float:
        """Add the gradients of `weight` times the loss of a batch, pass by pass, and return the loss."""
        answers = [len(row.tokens) - row.prompt_tokens for row in rows]
        total, mean, done = sum(answers), 0.0, 0
        for part in passes(rows, self.pass_tokens):
            share = sum(answers[done : done + len(part)]) / total
            loss = self.loss(part)
            (weight * share * loss).backward()
            mean += share * loss.item()
            done += len(part)
        return mean

    def after_step(self, step: int) -> dict[str, float]:
        """Called when the optimiser has stepped, before a checkpoint; returns what else the log keeps."""
        return {}


def multiplies_bfloat16(device: str) -> bool:
    """Whether the processor multiplies bfloat16 natively; emulated, it is slower than float32."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("amx_tile"))


@kept_pages()
def train(
    model: Any,
    rows: Sequence[EncodedRow],
    settings: TrainingSettings,
    *,
    seed: int,
    pad_token: int,
    checkpoint: Path,
    job: str,
    device: str = "cpu",
    autocast: bool = False,
    rate_factor: Callable[[str], float] | None = None,
    objective: Objective | None = None,
    on_progress: Callable[[Progress], None] | None = None,
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
    names, parameters = list(trained), list(trained.values())
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
        objective = Objective(model, pad_token=pad_token, device=device, autocast=autocast)
    objective.pass_tokens = settings.pass_tokens
    state = objective.state
    log = _load_checkpoint(checkpoint, job, names, parameters, optimizer, state) if checkpoint.exists() else []
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
            _save_checkpoint(checkpoint, job, names, parameters, optimizer, state, log)
        if on_progress is not None:
            per_step = (time.monotonic() - began) / (step + 1 - first)
            on_progress(Progress(step + 1, settings.steps, loss, eta_s=per_step * (settings.steps - step - 1)))
    optimizer.zero_grad(set_to_none=True)
    give_back_freed_memory()
    return log


def give_back_freed_memory() -> None:
    """Hand pages that were freed back to the system, where the C library can (glibc).

    A training step leaves the heap in pieces, most of them free, and glibc keeps them: on the 135M base two thirds of
    what the process holds after training, on top of which a merge would need its own.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _save_checkpoint(
    path: Path,
    job: str,
    names: Sequence[str],
    parameters: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, torch.Tensor],
    log: list[dict[str, float]],
) -> None:
    from safetensors.torch import save_file

    tensors = {f"state.{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
    for name, parameter in zip(names, parameters, strict=True):
        moments = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
        tensors[f"mean.{name}"] = moments["exp_avg"].cpu().contiguous()
        tensors[f"square.{name}"] = moments["exp_avg_sq"].cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        save_file(tensors, part, metadata={"job": job, "log": json.dumps(log)})


def _load_checkpoint(
    path: Path,
    job: str,
    names: Sequence[str],
    parameters: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, torch.Tensor],
) -> list[dict[str, float]]:
    import torch
    from safetensors import SafetensorError, safe_open

    remedy = f"Delete {path} to start over."
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("job") != job:
                raise TrainingError(f"checkpoint {path} belongs to another job", expected=f"job {job}", remedy=remedy)
            log: list[dict[str, float]] = json.loads(metadata["log"])
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(file.get_tensor(f"state.{name}"))
                for name, parameter in zip(names, parameters, strict=True):
                    parameter.copy_(file.get_tensor(f"weight.{name}"))
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(len(log))),
                        "exp_avg": file.get_tensor(f"mean.{name}").to(parameter.device),
                        "exp_avg_sq": file.get_tensor(f"square.{name}").to(parameter.device),
                    }
    except (SafetensorError, KeyError, json.JSONDecodeError, RuntimeError) as error:
        raise TrainingError(
            f"checkpoint {path} cannot be read: {error}", expected="one that this job wrote", remedy=remedy
        ) from error
    return log
