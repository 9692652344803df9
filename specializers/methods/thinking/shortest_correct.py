"""Length tuning of a variant that thinks: sample, keep the shortest correct thought of each ask, train on those.

Rejection sampling for the shortest correct reply: the variant writes several thoughts of its own for every ask, the
score says which led to right answers, and LoRA training goes on with the shortest of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import anyio
from pydantic import Field

from ....agents.answers.answer_schema import answer_schema
from ....agents.backend import Backend
from ....agents.errors import RecipeError, TrainingError, first_error
from ....agents.messages import Ask, Reply
from ....agents.thinking import ThinkingProfile
from ....agents.traffic import TrafficRow, read_traffic, write_traffic
from ..asked_role import AskedRole, RoleSettings, asked_role
from ..lora import LoraSettings, make_lora
from ..method import Job, Made, Method
from ..role_quality import score_reply

__all__ = ["METHOD", "ShortestCorrectSettings", "make_shortest_correct", "shortest_correct"]


class ShortestCorrectSettings(RoleSettings, LoraSettings):
    """Settings of length tuning: LoRA's (rank and alpha those of the parent), the role, and how to sample.

    Rows whose thinking is off are trained on as they are, so that off stays off. They may include rows of other roles,
    which a parent that plays several would otherwise forget.

    >>> ShortestCorrectSettings(role="puzzles.py:solver", samples=8, budget_tokens=128).temperature
    1.0
    """

    method: Literal["shortest_correct"] = "shortest_correct"  # type: ignore[assignment]

    samples: int = Field(default=4, ge=1)
    """Answers that are sampled for every row that thinks."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Temperature of the samples."""

    budget_tokens: int = Field(default=96, ge=1)
    """Most tokens that a sample thinks. A thought that was cut off there is not kept."""


def shortest_correct(replies: Iterable[tuple[float, Reply]], *, budget_tokens: int) -> Reply | None:
    """The reply with the fewest thinking tokens among those that scored 1 and ended their thinking themselves."""
    right = [reply for score, reply in replies if score >= 1.0 and 0 < reply.usage.thinking_tokens < budget_tokens]
    return min(right, key=lambda reply: reply.usage.thinking_tokens, default=None)


def make_shortest_correct(settings: ShortestCorrectSettings, job: Job) -> Made:
    """Sample through the backend, choose, and train a LoRA from the parent's into `job.out / "adapter"`.

    What was sampled is kept beside the checkpoint, so a killed training does not sample again.
    Raises: RecipeError as `asked_role`, TrainingError when no sample is right, and what `make_lora` raises.
    """
    off = [row for row in job.rows if not row.thinking]
    thinking = [row for row in job.rows if row.thinking]
    asked = asked_role("shortest_correct", settings, replace(job, rows=thinking))
    if not thinking:
        raise RecipeError("method 'shortest_correct': no row of its data thinks", expected="rows with `thinking`")
    path = job.work_dir / f"shortest-{job.fingerprint}.jsonl"
    if not path.is_file():
        write_traffic(path, anyio.run(_sample, settings, job.seed, asked, thinking))
    chosen = list(read_traffic(path))
    if not chosen:
        raise TrainingError(
            f"none of {settings.samples} samples of {len(thinking)} rows is right",
            expected="a parent that plays the role",
            remedy="Train the parent longer, or raise budget_tokens.",
        )
    made = make_lora(settings, replace(job, rows=[*chosen, *off]))
    card = {
        "sampled": len(thinking),
        "solved_by_a_sample": round(len(chosen) / len(thinking), 4),
        "thinking_characters": round(_mean_length(chosen), 1),
        "thinking_characters_before": round(_mean_length(thinking), 1),
    }
    return replace(made, card={**made.card, **card})


async def _sample(
    settings: ShortestCorrectSettings, seed: int, asked: AskedRole, rows: Sequence[TrafficRow]
) -> list[TrafficRow]:
    async with asked.backend as backend:
        answered = await _ask_all(backend, settings, seed, asked, rows)
    chosen = []
    for row, replies in zip(rows, answered, strict=True):
        scored = [(score_reply(asked.score, row, reply.text, asked.role), reply) for reply in replies]
        best = shortest_correct(scored, budget_tokens=settings.budget_tokens)
        if best is not None:
            chosen.append(row.model_copy(update={"thinking": best.thinking, "reply": best.text}))
    return chosen


async def _ask_all(
    backend: Backend, settings: ShortestCorrectSettings, seed: int, asked: AskedRole, rows: Sequence[TrafficRow]
) -> list[list[Reply]]:
    answered: dict[tuple[int, int], Reply] = {}

    async def ask_one(number: int, sample: int) -> None:
        answered[number, sample] = await backend.reply(
            Ask(
                run_id=f"sample-{number}-{sample}",
                step_path=asked.role.name,
                role=asked.role.name,
                messages=rows[number].messages,
                variant=asked.parent,
                answer_schema=answer_schema(asked.role.gives),
                max_tokens=asked.role.max_tokens,
                thinking=ThinkingProfile(max_tokens=settings.budget_tokens),
                temperature=settings.temperature,
                seed=seed * 1_000_003 + number * settings.samples + sample,
                task=rows[number].task,
            )
        )

    try:
        async with anyio.create_task_group() as asks:
            for number in range(len(rows)):
                for sample in range(settings.samples):
                    asks.start_soon(ask_one, number, sample)
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    return [[answered[number, sample] for sample in range(settings.samples)] for number in range(len(rows))]


def _mean_length(rows: Sequence[TrafficRow]) -> float:
    return sum(len(row.thinking or "") for row in rows) / len(rows)


METHOD = Method(settings=ShortestCorrectSettings, make=make_shortest_correct)
