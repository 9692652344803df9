"""How many tokens a role needs to retrieve: its quality and speed at each budget, against full attention.

Every budget is an engine of its own, on the weights that the method starts from, and answers the role's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio

from ....agents.backend import Backend
from ....agents.chat.chat_template import ChatTemplate, TemplateSettings
from ....agents.errors import QualityError, RecipeError
from ....agents.traffic import TrafficRow
from ...checkpoints.opened_by_transformers import open_tokenizer
from ...shelf.fier_settings import FierSettings
from ...training.loop import Progress
from ..asked_role import AskedRole, RoleSettings, asked_role
from ..measured_points import add_measured, read_measured
from ..method import Job, Made
from ..role_quality import RoleQuality, measure_role, paired_interval

__all__ = ["BudgetPoint", "held_budget", "prompt_tokens", "smallest_budget", "sweep_budgets"]


@dataclass(frozen=True)
class BudgetPoint:
    """A role at one budget, 0 for full attention: mean score, its paired difference to full attention, and times.

    `change` is the mean difference with its 95 % interval; `cpu_ms` what an ask took in CPU time, prompt and all;
    `decode_ms` the wall time of an answer's token after the first, beside whatever else the engine did.
    """

    budget_tokens: int
    quality: float
    change: tuple[float, float, float]
    cpu_ms: float
    decode_ms: float


def prompt_tokens(model: Path, rows: Sequence[TrafficRow], template: TemplateSettings) -> list[list[int]]:
    """Token ids of the rows' prompts in the checkpoint's chat template; raises ChatTemplateError as that does."""
    chats = ChatTemplate(open_tokenizer(model), template)
    return [chats.prompt([{"role": m.role, "content": m.content} for m in row.messages]) for row in rows]


def smallest_budget(points: Sequence[BudgetPoint], margin: float) -> BudgetPoint | None:
    """The smallest budget that scores at most `margin` less than full attention, None where none does."""
    held = (point for point in points if point.budget_tokens and point.change[0] >= -margin)
    return min(held, key=lambda point: point.budget_tokens, default=None)


def sweep_budgets(
    role: RoleSettings, settings: FierSettings, budgets: Sequence[int], job: Job
) -> tuple[str, list[BudgetPoint]]:
    """Measure a role at full attention and at each budget; the role's name and the points.

    Points that a killed sweep had measured are not measured again.
    Raises: RecipeError as `asked_role`, and what the backend raises.
    """
    if job.try_out is None:
        raise RecipeError(
            "method 'fier' with `budgets` asks engines, and nothing is served here",
            expected="`fier` as the recipe's first method, and a backend",
            remedy="Make it with `metier make RECIPE.yaml`; what other methods make, in a recipe of its own and as "
            "`parent` here.",
        )
    trials = [settings.model_copy(update={"budget_tokens": budget}) for budget in budgets]
    names, backend = job.try_out([Made(ask=job.ask, fier=trial) for trial in trials])
    asked = asked_role("fier", role, job, backend=backend)
    arms = {0: job.parent, **dict(zip(budgets, names, strict=True))}
    qualities = anyio.run(_measure, asked, arms, job, backend)
    full = qualities[0].scores
    points = [
        BudgetPoint(
            budget,
            round(quality.mean, 4),
            _rounded(paired_interval(quality.scores, full)),
            round(quality.cpu_ms_per_ask, 2),
            round(1000 * quality.decode_s / max(quality.answer_tokens - len(full), 1), 3),
        )
        for budget, quality in sorted(qualities.items())
    ]
    return asked.role.name, points


def held_budget(role: str, points: Sequence[BudgetPoint], margin: float) -> BudgetPoint:
    """The budget that the variant gets; raises QualityError where none holds the role's quality."""
    chosen = smallest_budget(points, margin)
    if chosen is None:
        best = max((point for point in points if point.budget_tokens), key=lambda point: point.quality)
        raise QualityError(
            f"role {role!r} scores {points[0].quality:.3f} with full attention, and at best {best.quality:.3f} when it "
            f"retrieves {best.budget_tokens} tokens",
            expected=f"at most {margin:g} less at one of the budgets",
            remedy="Try larger `budgets`, allow a larger `margin`, or serve the role with full attention.",
        )
    return chosen


async def _measure(
    asked: AskedRole, arms: dict[int, str | None], job: Job, backend: AbstractAsyncContextManager[Backend]
) -> dict[int, RoleQuality]:
    path = job.work_dir / f"budgets-{job.fingerprint}.jsonl"
    found: dict[int, RoleQuality] = {point.budget: point for point in read_measured(path, _MeasuredBudget)}
    async with backend as engines:
        for done, (budget, variant) in enumerate(arms.items()):
            if budget not in found:
                found[budget] = await measure_role(engines, asked.role, job.rows, variant, asked.score)
                add_measured(path, {"budget": budget, **asdict(found[budget])})
            if job.on_progress is not None:
                job.on_progress(Progress(done + 1, len(arms), found[budget].mean, "score"))
    return {budget: found[budget] for budget in arms}


@dataclass(frozen=True, kw_only=True)
class _MeasuredBudget(RoleQuality):
    """A line of the file: what the role scored with a budget."""

    budget: int


def _rounded(values: tuple[float, float, float]) -> tuple[float, float, float]:
    mean, low, high = (round(value, 4) for value in values)
    return mean, low, high
