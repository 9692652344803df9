"""How long a variant should think at a role: accuracy and cost of (variant, budget) pairs, swept jointly.

Budget forcing (s1, arXiv 2501.19393) cuts thinking at each budget; the variant that comes of it thinks up to the
smallest budget that is as good as its best, within a margin. Its card keeps all points and the fitted curves, and the
pairs worth probing: those that no other pair beats at the same cost, whether a weaker variant that thinks longer or a
stronger one that thinks less.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import anyio
from pydantic import Field, field_validator

from ....agents.thinking import ThinkingProfile
from ...training.loop import Progress
from ..asked_role import AskedRole, RoleSettings, asked_role
from ..measured_points import add_measured, read_measured
from ..method import Job, Made, Method
from ..role_quality import measure_role, paired_interval
from .curves import ThinkingPoint, efficient_points, fit_saturation, saturated_budget

__all__ = ["METHOD", "ThinkingSettings", "make_thinking"]


class ThinkingSettings(RoleSettings):
    """Settings of the sweep over thinking budgets.

    >>> ThinkingSettings(role="puzzles.py:solver", budgets=(0, 32, 64)).also
    ('base',)
    """

    method: Literal["thinking"] = "thinking"

    budgets: tuple[int, ...] = Field(default=(0, 8, 16, 24, 32, 48, 64), min_length=2)
    """Budgets to measure, in tokens, rising. 0 is thinking off."""

    also: tuple[str, ...] = ("base",)
    """Names of other variants (or `base`) to measure beside the parent."""

    margin: float = Field(default=0.02, ge=0.0, le=1.0)
    """The result gets the smallest budget whose score is at most this far below its best."""

    @field_validator("budgets")
    @classmethod
    def _rising(cls, budgets: tuple[int, ...]) -> tuple[int, ...]:
        if list(budgets) != sorted(set(budgets)) or budgets[0] < 0:
            raise ValueError("rising numbers of tokens, 0 or more, each once")
        return budgets


def make_thinking(settings: ThinkingSettings, job: Job) -> Made:
    """Sweep the parent and the variants beside it, and give the parent's adapter the budget it is best asked with.

    Points that a killed sweep had measured are not measured again.
    Raises: RecipeError as `asked_role`, and what the backend raises.
    """
    asked = asked_role("thinking", settings, job)
    title = str(job.parent_name)
    variants = {title: asked.parent, **{name: name for name in settings.also if name != title}}
    points = anyio.run(_sweep, settings, job, asked, variants)
    own = [point for point in points if point.variant == title]
    chosen = saturated_budget(own, settings.margin)
    if job.adapter is not None:
        shutil.copytree(job.adapter, job.out / "adapter")
    curves = {name: _curve([p for p in points if p.variant == name]) for name in variants}
    card = {
        "role": asked.role.name,
        "asks": len(job.rows),
        "thinking_budget": chosen.budget_tokens,
        "thinking_used": round(chosen.used_tokens, 1),
        "thinking_quality": round(chosen.quality, 4),
        "thinking": {
            "points": [_rounded(point) for point in points],
            "curves": curves,
            "probe": [f"{p.variant}@{p.budget_tokens}" for p in efficient_points(points)],
        },
    }
    ask = job.ask.model_copy(update={"thinking": ThinkingProfile(max_tokens=chosen.budget_tokens)})
    return Made(ask=ask, card=card)


async def _sweep(
    settings: ThinkingSettings, job: Job, asked: AskedRole, variants: Mapping[str, str]
) -> list[ThinkingPoint]:
    path = job.work_dir / f"sweep-{job.fingerprint}.jsonl"
    known = {(point.variant, point.budget_tokens): point for point in read_measured(path, ThinkingPoint)}
    steps, done = len(variants) * len(settings.budgets), 0
    async with asked.backend as backend:
        for name, variant in variants.items():
            for budget in settings.budgets:
                if (name, budget) not in known:
                    quality = await measure_role(
                        backend,
                        asked.role,
                        job.rows,
                        None if variant == "base" else variant,
                        asked.score,
                        thinking=ThinkingProfile(max_tokens=budget),
                    )
                    _, low, high = paired_interval(quality.scores, [0.0] * len(quality.scores))
                    point = ThinkingPoint(
                        name,
                        budget,
                        quality.mean,
                        (low, high),
                        quality.thinking_tokens / len(job.rows),
                        quality.cpu_ms_per_ask,
                        len(job.rows),
                    )
                    known[name, budget] = point
                    add_measured(path, asdict(point))
                done += 1
                if job.on_progress is not None:
                    job.on_progress(Progress(done, steps, known[name, budget].quality, "score"))
    return [known[name, budget] for name in variants for budget in settings.budgets]


def _curve(points: list[ThinkingPoint]) -> dict[str, float]:
    curve = fit_saturation([p.used_tokens for p in points], [p.quality for p in points])
    return {name: round(value, 4) for name, value in asdict(curve).items()}


def _rounded(point: ThinkingPoint) -> dict[str, Any]:
    record = asdict(point)
    record.update(
        quality=round(point.quality, 4),
        interval=[round(value, 4) for value in point.interval],
        used_tokens=round(point.used_tokens, 2),
        cpu_ms=round(point.cpu_ms, 2),
    )
    return record


METHOD = Method(settings=ThinkingSettings, make=make_thinking)
