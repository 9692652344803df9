"""NPFT: tune a model to tolerate noise on the weights a quantiser hurts most, then quantise it by any method.

A low-rank update is trained on the sum of two losses, with noise on the sensitive base weights and without; it is
then added to the clean weights. The result is an ordinary checkpoint; name `ptq` next in the recipe.
Source: Noise Perturbation Fine-tuning for Robust LLM Quantization, CPAL 2025, arXiv 2412.06858. Where it and its
code disagree: both losses are used (the code has the noisy one only), all answer tokens count (the code: the last
of a segment), and one optimiser with one schedule runs through all epochs (the code starts a new one in each).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Unpack

from pydantic import Field

from ....agents.errors import RecipeError, TrainingError
from ...checkpoints.tensor_files import base_tensors
from ...shelf.variant import AskSpec
from ...training.batches import EncodedRow, encode_rows
from ...training.curvature import fisher_diagonals
from ...training.loop import TrainingSettings
from ...training.objective import Objective, Placed
from ...training.weight_swap import with_entries
from ..calibration import sample_rows
from ..method import Job, Made, Method
from ..trained import Targets, add_lora, linear_targets, train_job
from ..tunable import check_tunable, load_tunable, save_tuned
from .noise import range_noise, sensitive_positions, step_noise

if TYPE_CHECKING:
    import torch

__all__ = ["METHOD", "NoisyObjective", "NpftSettings", "make_npft"]


class NpftSettings(TrainingSettings):
    """Settings of NPFT. Noise goes to every linear layer but the output head.

    >>> NpftSettings(noise="step", step_bits=4, step_group_size=64).epochs
    3
    """

    method: Literal["npft"] = "npft"

    rank: int = Field(default=16, ge=1, le=512)
    """Rank of the update that is trained and then added to the weights."""

    alpha: float = Field(default=32.0, gt=0.0)
    """The update is scaled by alpha ÷ rank."""

    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the update's inputs that are set to 0 in training."""

    targets: Targets = "all-linear"
    """Names of the modules that get an update. `all-linear` is every linear layer but the output head."""

    noise: Literal["range", "step", "none"] = "range"
    """`range` is the published algorithm: uniform over the sensitive weights of an output channel, whatever the width.
    `step` is the theory: within half a step of a `step_bits` quantiser. `none` is the control without noise."""

    resample: Literal["epoch", "step"] = "epoch"
    """When new noise is drawn: at the start of each epoch, or at every step."""

    sensitive_percent: float = Field(default=0.5, ge=0.0, le=100.0)
    """Per cent of each matrix that get noise: those with the largest Fisher score."""

    epochs: int = Field(default=3, ge=1)
    """Equal parts of the run. The Fisher scores are taken at the start of each."""

    fisher_rows: int = Field(default=128, ge=1)
    """Rows that the Fisher scores are summed over."""

    beta: float = Field(default=0.5, ge=0.0)
    """Weight of the loss without noise."""

    step_bits: int = Field(default=4, ge=2, le=8)
    """Width of the quantiser of `noise: step`, in bits."""

    step_group_size: int | None = Field(default=None, ge=1)
    """Inputs that share a scale in that quantiser. None is all of an output channel."""

    learning_rate: float = Field(default=2e-4, gt=0.0)
    """Highest learning rate."""

    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls to 0; `constant` keeps it."""

    weight_decay: float = Field(default=0.01, ge=0.0)
    """Weight decay of the optimiser (AdamW)."""


def make_npft(settings: NpftSettings, job: Job) -> Made:
    """Write `job.out / "weights"`: the job's checkpoint plus the low-rank update trained under noise.

    Raises: RecipeError (targets or group size that the model does not have), TrainingError (no rows, not finite,
    rows too long, or a checkpoint of another job).
    """
    import torch

    base = load_tunable(job, settings)
    rows = encode_rows(job.rows, base.tokenizer, max_row_tokens=settings.max_row_tokens, template=job.template)
    head = base.model.get_output_embeddings()
    noisy = {
        name: module.weight
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    tuned = add_lora(
        base.model,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        targets=linear_targets(base.model, settings.targets),
        seed=job.seed,
    )
    objective = NoisyObjective(
        tuned,
        settings,
        noisy,
        rows,
        seed=job.seed,
        **base.placed,
    )
    log, card = train_job(job, settings, base, tuned, rows, objective=objective)
    save_tuned(tuned.merge_and_unload(), job)
    card["noise"] = settings.noise
    card["noisy_weights"] = sum(p.numel() for p in objective.positions.values())
    return Made(ask=AskSpec(), card=card, log=log)


class NoisyObjective(Objective):
    """L(W + z + sUV) + β L(W + sUV): the loss under noise on W, and the weighted one without (section 3.3).

    `weights` are the frozen W by name, clean before and after every step; `positions` those that carry noise now.
    """

    def __init__(
        self,
        model: Any,
        settings: NpftSettings,
        weights: Mapping[str, torch.Tensor],
        rows: Sequence[EncodedRow],
        *,
        seed: int,
        **placed: Unpack[Placed],
    ) -> None:
        super().__init__(model, **placed)
        import torch

        self.settings = settings
        self.weights = weights if settings.noise != "none" else {}
        self.seed = seed
        self.epoch_steps = -(-settings.steps // settings.epochs)
        self.fisher_rows = sample_rows(rows, count=settings.fisher_rows, seed=seed)
        self.positions = {
            name: torch.empty(int(weight.numel() * settings.sensitive_percent / 100), dtype=torch.int64)
            for name, weight in self.weights.items()
        }
        self.state = {f"positions.{name}": positions for name, positions in self.positions.items()}
        self._noise: tuple[int, dict[str, torch.Tensor]] | None = None

    def add_gradients(self, rows: Sequence[EncodedRow], step: int) -> dict[str, float]:
        if step % self.epoch_steps == 0:
            self._choose_positions()
        if not self.weights:
            # Without noise the two losses are one: one pass, of the weight of both.
            return {"loss": self.add_answer_gradients(rows, 1 + self.settings.beta)}
        # Each pass ends in its backward: the weights it went through are changed afterwards.
        with self.noise_applied(step):
            measured = {"loss": self.add_answer_gradients(rows)}
        if self.settings.beta > 0:
            measured["clean_loss"] = self.add_answer_gradients(rows, self.settings.beta)
        return measured

    def noise_applied(self, step: int) -> AbstractContextManager[None]:
        """W + z while it is entered; z is the same for all steps of an epoch, or of each step alone."""
        if not self.weights:
            return nullcontext()
        draw = step if self.settings.resample == "step" else step // self.epoch_steps
        if self._noise is None or self._noise[0] != draw:
            self._noise = draw, self.drawn_noise(draw)
        positions = {name: at.to(self.weights[name].device) for name, at in self.positions.items()}
        return with_entries(self.weights, positions, self._noise[1])

    def drawn_noise(self, draw: int) -> dict[str, torch.Tensor]:
        """Noise number `draw` for every matrix, at its positions; depends on seed and number only."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        found = {}
        for name, weight in self.weights.items():
            at = self.positions[name].to(weight.device)
            if self.settings.noise == "range":
                found[name] = range_noise(weight, at, generator=generator)
            else:
                found[name] = step_noise(
                    weight,
                    at,
                    bits=self.settings.step_bits,
                    group_size=self.settings.step_group_size,
                    generator=generator,
                )
        return found

    def _choose_positions(self) -> None:
        """The sensitive weights of the model as it is now.

        The gradient at W of a layer that adds sUV beside it is the gradient at W + sUV, so nothing is merged.
        """
        if not self.weights or self.settings.sensitive_percent == 0:
            return
        self._noise = None
        was_training = self.model.training
        self.model.eval()  # sensitivity is that of the model without dropout
        fisher = fisher_diagonals(self.weights, [partial(self.loss, [row]) for row in self.fisher_rows])
        self.model.train(was_training)
        for name, scores in fisher.items():
            if not bool(scores.isfinite().all()):
                raise TrainingError(
                    f"the squared gradients of {name} are not finite",
                    expected="finite numbers",
                    remedy=f"Lower learning_rate={self.settings.learning_rate}; the checkpoint before this is kept.",
                )
            self.positions[name].copy_(sensitive_positions(scores, self.settings.sensitive_percent))


def _check(settings: NpftSettings, job: Job) -> None:
    check_tunable(job)
    group_size = settings.step_group_size
    if settings.noise != "step" or group_size is None:
        return
    for name, info in base_tensors(job.model).items():
        linear = len(info.shape) == 2 and "embed" not in name and not name.startswith("lm_head")
        if linear and info.shape[1] % group_size:
            raise RecipeError(
                f"step_group_size={group_size} does not divide the {info.shape[1]} inputs of {name}",
                expected="a divisor of every layer's inputs",
                remedy="Choose one of the quantiser's group sizes, or leave it out for one step per channel.",
            )


METHOD = Method(settings=NpftSettings, make=make_npft, makes="weights", check=_check)
