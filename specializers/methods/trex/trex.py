"""T-REX: many tasks in one adapter of rank-one experts, gated per token and by the kind of task.

Source: "T-REX: Mixture-of-Rank-One-Experts with Semantic-aware Intuition" (arXiv 2404.08985) and its released code.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from ....agents.errors import RecipeError
from ...adapters.adapter_check import SLOT_RANKS
from ...adapters.adapter_writing import write_adapter
from ...adapters.semantic_map import SemanticMap
from ...adapters.text_embedding import DEFAULT_EMBEDDING, find_embedding
from ...adapters.trex_shape import K_TASK, MOST_GAIN, R1, R2, SHARPNESS, TREX, TrexShape
from ...shelf.variant import AskSpec
from ...training.batches import encode_rows
from ...training.loop import TrainingSettings
from ..adapter_training import check_served_targets, load_base, load_parent, parent_config, served_targets
from ..method import Job, Made, Method
from ..trained import Targets, train_job

if TYPE_CHECKING:
    from .tuner import TrexConfig

__all__ = ["METHOD", "TrexSettings", "make_trex"]


class TrexSettings(TrainingSettings):
    """Settings of T-REX: r1 + r2 vectors a layer, which make r1·r2 experts.

    >>> TrexSettings(r1=2, r2=4).k_task
    4.0
    """

    method: Literal["trex"] = "trex"

    r1: int = Field(default=R1, ge=1, le=64)
    """Vectors of A."""

    r2: int = Field(default=R2, ge=1, le=64)
    """Vectors of B."""

    k_tok: float | None = Field(default=None, gt=0.0, le=MOST_GAIN)
    """Weight of the token router in the gate. None is r1·r2, as released."""

    k_task: float = Field(default=K_TASK, gt=0.0, le=MOST_GAIN)
    """Weight of the intuition (what kind of task it is) in the gate."""

    intuition: bool = True
    """Whether the gate knows the kind of task. False is the ablation: `k_task` is stored as 0, so that serving leaves
    it out too."""

    embed_id: str = DEFAULT_EMBEDDING
    """Function that turns a task's text into a vector; its name and version."""

    router_init_std: float = Field(default=0.02, ge=0.0)
    """Standard deviation of the router's first values. 0 is as released: without intuition the columns of B then differ
    by rounding only, and B keeps rank one for long."""

    gate_learning_rate: float = Field(default=2e-4, gt=0.0)
    """Learning rate of omega and gamma. They go through sigmoid(100 x), so that the matrices' rate would saturate them
    within tens of steps."""

    targets: Targets = "all-linear"
    """Names of the modules that get an update. `all-linear` is every linear layer that the engine takes
    adapters for, but the output head."""

    @model_validator(mode="after")
    def _fits_a_slot(self) -> Self:
        rows, most = TrexShape.released(self.r1, self.r2).rows, SLOT_RANKS[-1]
        if rows > most:
            raise RecipeError(
                f"r1 {self.r1} and r2 {self.r2} make r1 + r1·r2 = {rows} rows of an adapter slot",
                expected=f"at most {most}, the widest slot of an engine",
                remedy=f"With r1 {self.r1}, set r2 to {most // self.r1 - 1} or less.",
            )
        return self


def make_trex(settings: TrexSettings, job: Job) -> Made:
    """Train a T-REX adapter into `job.out / "adapter"`, going on from the parent's adapter when there is one.

    The semantic map is fitted on the rows' distinct tasks; a parent's map is kept, since its gates know no other.
    Raises: RecipeError (rows without a task, fewer tasks than experts, targets the model does not have, or sizes
    other than the parent's), TrainingError (not finite, rows too long, or a checkpoint of another job).
    """
    import torch
    from peft import get_peft_model, get_peft_model_state_dict

    from .tuner import TrexConfig

    tasks = _tasks(job)
    config = TrexConfig(
        task_type="CAUSAL_LM",
        r1=settings.r1,
        r2=settings.r2,
        k_tok=settings.k_tok,
        k_task=settings.k_task if settings.intuition else 0.0,
        router_init_std=settings.router_init_std,
        embed_id=settings.embed_id,
    )
    semantic_map = _semantic_map(settings, job, config, tasks)
    base = load_base(job, settings)
    rows = encode_rows(
        job.rows,
        base.tokenizer,
        max_row_tokens=settings.max_row_tokens,
        intuition=semantic_map.intuition if settings.intuition else None,
        template=job.template,
    )
    targets = served_targets(base.model, settings.targets)
    config.target_modules = targets
    torch.manual_seed(job.seed)
    tuned = get_peft_model(base.model, config, autocast_adapter_dtype=True)
    tuned.set_semantic_map(semantic_map)
    if job.adapter is not None:
        load_parent(tuned, job.adapter)
    factor = settings.gate_learning_rate / settings.learning_rate
    log, trained = train_job(
        job, settings, base, tuned, rows, rate_factor=lambda name: factor if ".trex_" in name else 1.0
    )
    tensors = {
        name: tensor.to(torch.bfloat16) if ".lora_" in name else tensor.float()
        for name, tensor in get_peft_model_state_dict(tuned).items()
    }
    block = config.to_dict()["trex"]
    written = {"peft_type": TREX, "target_modules": targets, "trex": block}
    write_adapter(job.out / "adapter", tensors, written, base_name=job.base_name)
    card = {
        **trained,
        "parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "intuition": asdict(semantic_map.spread(tasks)),
        "alpha": _sigmoids(tensors, ".trex_omega"),
        "scale": _sigmoids(tensors, ".trex_gamma"),
    }
    return Made(ask=AskSpec(adapter="trex", rank=config.shape.rows), card=card, log=log)


def _tasks(job: Job) -> list[str]:
    """The distinct tasks of the rows, in order."""
    for number, row in enumerate(job.rows, 1):
        if not row.task:
            raise RecipeError(
                f"training row {number} has no task",
                expected="the text of its run's input, which T-REX's intuition comes from",
                remedy="Export the traffic again with this version, or set task=task_text(...) in the program's rows.",
            )
    return list(dict.fromkeys(row.task for row in job.rows))


def _semantic_map(settings: TrexSettings, job: Job, config: TrexConfig, tasks: list[str]) -> SemanticMap:
    if job.adapter is None:
        return SemanticMap.fit(tasks, config.shape.experts, embed=find_embedding(settings.embed_id), seed=job.seed)
    wanted, found = config.to_dict()["trex"], parent_config(job, TREX)["trex"]
    for name, value in wanted.items():
        if found.get(name) != value:
            raise RecipeError(
                f"{name} {value} differs from the parent adapter's {found.get(name)}",
                expected="the parent's, since training goes on from it",
                remedy=f"Set it as the parent has it ({name}: {found.get(name)}), or parent: base.",
            )
    return SemanticMap.load(job.adapter)


def _sigmoids(tensors: dict[str, Any], ending: str) -> dict[str, float]:
    """Mean, least and greatest of sigmoid(100 x) over the layers' scalars."""
    import torch

    values = torch.sigmoid(SHARPNESS * torch.cat([t for name, t in tensors.items() if name.endswith(ending)]))
    return {
        name: round(float(v), 4) for name, v in (("mean", values.mean()), ("min", values.min()), ("max", values.max()))
    }


def _check(settings: TrexSettings, job: Job) -> None:
    check_served_targets(settings.targets, job)


METHOD = Method(settings=TrexSettings, make=make_trex, check=_check)
