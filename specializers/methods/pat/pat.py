"""PAT, pruning-aware tuning: a narrower dense model whose channels are chosen while LoRA tunes it on a role's rows.

Source: "Pruning-Aware Tuning for Large Language Models" (arXiv 2408.14721, AAAI 2025) and its released code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ....agents.errors import RecipeError, TrainingError
from ...checkpoints.attention import model_of
from ...checkpoints.dense_checkpoint import size_card, write_dense
from ...checkpoints.prunable_models import WIDTH_STEP, PrunableModel, check_width, read_prunable
from ...shelf.variant import AskSpec
from ...training.batches import EncodedRow, encode_rows
from ...training.loop import TrainingSettings
from ...training.speed import give_back_freed_memory
from ..calibration import sample_rows
from ..method import Job, Made, Method
from ..trained import LoadedBase, add_lora, linear_targets, train_job, training_checkpoint
from ..tunable import load_tunable

if TYPE_CHECKING:
    import torch

    from .tuner import PatModel, PatObjective

__all__ = ["METHOD", "PatSettings", "check_pat", "make_pat"]

_INT4_STEP = 32
# Largest difference of logits, as a share of the largest logit, that float32 rounding of a sound merge may leave.
_MERGE_TOLERANCE = 1e-3


class PatSettings(TrainingSettings):
    """Settings of PAT: channels of the residual stream are chosen while LoRA tunes the model.

    >>> PatSettings(hidden_size=448, steps=300).milestone
    100
    """

    method: Literal["pat"] = "pat"

    hidden_size: int = Field(ge=WIDTH_STEP)
    """Channels that stay, exactly."""

    lora_rank: int = Field(default=16, ge=1, le=512)
    """Rank of the LoRA that tunes the model meanwhile."""

    lora_alpha: float = Field(default=32.0, gt=0.0)
    """That LoRA is scaled by alpha ÷ rank."""

    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of that LoRA's inputs that are set to 0 in training."""

    operator_rank: int = Field(default=32, ge=1)
    """Rank of the trained operators that stand between blocks, about 5 % of the width."""

    embedding_operator: Literal["auto", "mask_only", "trained"] = "auto"
    """What stands behind the embedding. `mask_only` keeps a tied head tied; `trained` is the published form and gives a
    tied head a matrix of its own; `auto` is the first for tied bases, the second for others."""

    channels: Literal["learned", "random"] = "learned"
    """`learned` is PAT. `random` is the control: drawn beforehand and faded out linearly, all else equal."""

    mask_start: Literal["fisher", "zeros"] = "fisher"
    """`fisher` ranks the channels before the first step by what rows' losses say of each; the task can still change it.
    `zeros` is as published, and needs thousands of steps to separate the channels."""

    calibration_rows: int = Field(default=64, ge=1)
    """Rows for `mask_start: fisher`."""

    milestone_share: float = Field(default=1 / 3, gt=0.0, le=1.0)
    """Share of the steps after which the mask's schedule ends."""

    harden: Literal["milestone", "end"] = "milestone"
    """When the mask becomes exactly 0 and 1: at the milestone, or only after the last step, as published."""

    mask_learning_rate: float = Field(default=0.02, gt=0.0)
    """Learning rate of the mask: its values have to travel 0.5 within the milestone."""

    active_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the loss that holds the mask to `hidden_size` channels."""

    identity_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the loss that keeps the operators near the identity."""

    @property
    def milestone(self) -> int:
        """The step s0 at which the schedule ends."""
        return round(self.steps * self.milestone_share)

    @model_validator(mode="after")
    def _whole(self) -> PatSettings:
        if self.milestone < 2:
            raise ValueError(f"steps x milestone_share must be at least 2, not {self.milestone}")
        if self.weight_decay:
            raise ValueError("weight_decay must be 0: it would pull the mask's proxies back to undecided")
        return self


def check_pat(settings: PatSettings, job: Job) -> None:
    """Say what cannot work on the job's checkpoint, from its config and tensor names alone.

    Raises: RecipeError for a width that is no smaller or that kernels do not take, an unknown or quantised model,
    or an untied form that would be larger than what it is made from.
    """
    from .merge import exported_type, merged_parameters

    model = read_prunable(job.model)
    check_width("hidden_size", settings.hidden_size, model.hidden_size)
    exported_type(model, settings.hidden_size)
    untie = unties(settings, model)
    if untie and model.family.tied_only:
        raise RecipeError(
            "embedding_operator: trained gives the model a head of its own",
            expected=f"a tied head: the engine knows no other for {model.config['model_type']}",
            remedy="Set embedding_operator: mask_only, which keeps the head tied.",
        )
    parameters = merged_parameters(model, settings.hidden_size, untie=untie)
    if parameters >= model.parameters:
        raise RecipeError(
            f"at hidden_size {settings.hidden_size} with a head of its own the pruned model would have {parameters:,} "
            f"parameters",
            expected=f"fewer than the {model.parameters:,} it is made from, whose head is tied",
            remedy="Set embedding_operator: mask_only, which keeps the head tied, or a smaller hidden_size.",
        )


def unties(settings: PatSettings, model: PrunableModel) -> bool:
    """Whether a tied head must get a matrix of its own, since the embedding changes beyond dropping channels."""
    return model.tied and settings.embedding_operator == "trained"


def make_pat(settings: PatSettings, job: Job) -> Made:
    """Tune and prune the job's model into `job.out / "weights"`; a LoRA that came before is folded in first.

    Raises: RecipeError as `check_pat`, TrainingError (not finite, rows too long, a checkpoint of another job, or a
    merge that does not compute what was tuned), OSError when the disk is full.
    """
    from .merge import merge_model, merged_config
    from .tuner import PatObjective

    check_pat(settings, job)
    shape = read_prunable(job.model)
    base = load_tunable(job, settings)
    rows = encode_rows(job.rows, base.tokenizer, max_row_tokens=settings.max_row_tokens, template=job.template)
    tuned = _with_operators(settings, job, shape, base)
    objective = PatObjective(
        tuned, active_weight=settings.active_weight, identity_weight=settings.identity_weight, **base.placed
    )
    ranked = settings.channels == "learned" and settings.mask_start == "fisher"
    if ranked and not training_checkpoint(job).exists():
        _rank_channels(settings, objective, rows, job.seed)
        give_back_freed_memory()
    factor = settings.mask_learning_rate / settings.learning_rate
    log, trained_card = train_job(
        job,
        settings,
        base,
        tuned,
        rows,
        rate_factor=lambda name: factor if "proxies" in name else 1.0,
        objective=objective,
    )
    mask = _mask_card(tuned, settings)
    tuned.mask.harden()
    tuned = tuned.cpu().eval()
    untie = unties(settings, shape)
    keep = tuned.mask.keep()
    tensors = merge_model(
        tuned.tensors(),
        tuned.operator_tensors(),
        keep,
        shape.family,
        hidden_size=shape.hidden_size,
        tied=shape.tied,
        untie=untie,
    )
    config = merged_config(shape, settings.hidden_size, untie=untie)
    error = merge_error(tuned, tensors, config, rows[:4])
    if not error <= _MERGE_TOLERANCE:
        raise TrainingError(
            f"the merged model's logits differ from the tuned model's by {error:.2g} of the largest",
            expected=f"at most {_MERGE_TOLERANCE}, which is rounding",
            remedy="This model computes something that the merge does not know; start from another base.",
        )
    write_dense(job.out / "weights", tensors, config)
    card = {
        **trained_card,
        "trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        **size_card(job.out / "weights", shape),
        "int4_kernels": settings.hidden_size % _INT4_STEP == 0,
        "merge_error": float(f"{error:.2g}"),
        "mask": mask,
    }
    return Made(ask=AskSpec(), card=card, log=log)


def _with_operators(settings: PatSettings, job: Job, shape: PrunableModel, base: LoadedBase) -> PatModel:
    from .modules import ChannelMask
    from .tuner import PatModel

    # The operators draw their first matrices from the generator that this seeds.
    tuned = add_lora(
        base.model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=linear_targets(base.model, "all-linear"),
        seed=job.seed,
    )
    mask = ChannelMask(
        shape.hidden_size,
        settings.hidden_size,
        milestone=settings.milestone,
        harden_step=settings.milestone if settings.harden == "milestone" else settings.steps,
        channels=settings.channels,
        seed=job.seed,
    ).to(base.device)
    only_mask = settings.embedding_operator == "mask_only" or (settings.embedding_operator == "auto" and shape.tied)
    return PatModel(tuned, mask, rank=settings.operator_rank, embedding_rank=0 if only_mask else settings.operator_rank)


def _rank_channels(settings: PatSettings, objective: PatObjective, rows: list[EncodedRow], seed: int) -> None:
    import torch

    from .modules import ranked_proxies
    from .tuner import channel_importance

    importance = channel_importance(objective, sample_rows(rows, count=settings.calibration_rows, seed=seed))
    with torch.no_grad():
        objective.pat.mask.proxies.copy_(ranked_proxies(importance, settings.hidden_size))


def _mask_card(tuned: PatModel, settings: PatSettings) -> dict[str, Any]:
    """How decided the mask was when it became hard: channels above zero then, and the largest step any value took."""
    from .modules import hard_mask, soft_mask

    proxies = tuned.mask.proxies.detach()
    card: dict[str, Any] = {"channels": settings.channels, "kept": settings.hidden_size}
    if settings.channels == "learned":
        card["start"] = settings.mask_start
        soft = soft_mask(proxies, tuned.mask.harden_step, settings.milestone)
        card["above_zero"] = int((proxies > 0).sum())
        card["hardening_jump"] = round(float((soft - hard_mask(proxies, settings.hidden_size)).abs().max()), 4)
    return card


def merge_error(
    tuned: PatModel, tensors: dict[str, torch.Tensor], config: dict[str, Any], rows: list[EncodedRow]
) -> float:
    """Largest difference of logits between the tuned model and the merged one, as a share of the largest logit."""
    import torch
    from transformers import AutoConfig

    merged = model_of(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    missed = merged.load_state_dict(tensors, strict=False)
    if missed.unexpected_keys or set(missed.missing_keys) - {"lm_head.weight"}:
        raise TrainingError(f"the merged model does not load: {missed}", expected="its own tensors, all of them")
    merged.tie_weights()
    worst = largest = 0.0
    with torch.no_grad():
        for row in rows:
            tokens = torch.tensor([row.tokens])
            expected, found = tuned(input_ids=tokens).logits, merged(input_ids=tokens).logits
            worst = max(worst, float((expected - found).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    return worst / largest


METHOD = Method(settings=PatSettings, make=make_pat, makes="weights", check=check_pat)
