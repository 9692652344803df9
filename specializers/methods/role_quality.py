"""How well a variant plays one role: its own asks, answered through a backend, each scored against its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from ...agents.answers.answer_schema import answer_schema
from ...agents.answers.answers import parse_answer
from ...agents.answers.held_schema import served_schema
from ...agents.backend import Backend
from ...agents.errors import AnswerError, RecipeError, first_error
from ...agents.messages import Ask, Reply
from ...agents.roles import Role
from ...agents.thinking import ThinkingProfile
from ...agents.tools.calls import read_calls, turn_schema
from ...agents.tools.tool import Tool
from ...agents.traffic import TrafficRow

__all__ = ["RoleQuality", "Score", "measure_role", "paired_interval", "same_answer", "score_reply"]

Score = Callable[[TrafficRow, Any], float]
RESAMPLES = 10_000


@dataclass(frozen=True)
class RoleQuality:
    """What a variant scored on each row, in order, and what its answers cost.

    `scores` are 0 to 1; `cpu_s` is the engine's process CPU time charged to all of them, `answer_tokens` all it wrote,
    of which `thinking_tokens` were thinking; `decode_s` is the wall time from their first token to their last, summed.
    """

    scores: tuple[float, ...]
    cpu_s: float
    answer_tokens: int
    thinking_tokens: int = 0
    decode_s: float = 0.0

    @property
    def mean(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)

    @property
    def cpu_ms_per_ask(self) -> float:
        """CPU milliseconds an ask took."""
        return 1000 * self.cpu_s / len(self.scores)


def same_answer(row: TrafficRow, answer: Any) -> float:
    """1.0 where the answer is the row's own, as the role's type reads both."""
    try:
        return float(answer == parse_answer(row.reply, type(answer)))
    except AnswerError:
        return 0.0


async def measure_role(
    backend: Backend,
    role: Role,
    rows: Sequence[TrafficRow],
    variant: str | None,
    score: Score = same_answer,
    *,
    thinking: ThinkingProfile | None = None,
    on_reply: Callable[[int], None] | None = None,
) -> RoleQuality:
    """Ask `variant` every row of a role, greedily and all at once, and score what it answers.

    `thinking` is how long it may think; without it the role's own setting holds, else the variant's.

    A reply that is not of the role's type scores 0, as does one cut off. `on_reply` is called with the number of
    replies so far.
    Raises: RecipeError when the score is no number from 0 to 1, and what the backend raises.
    """
    replies: dict[int, Reply] = {}

    async def ask_one(number: int) -> None:
        row = rows[number]
        replies[number] = await backend.reply(
            Ask(
                run_id=f"quality-{variant or 'base'}-{number}",
                step_path=role.name,
                role=role.name,
                messages=row.messages,
                variant=variant,
                answer_schema=_reply_schema(role, row),
                max_tokens=role.max_tokens,
                thinking=role.thinking if thinking is None else thinking,
                task=row.task,
            )
        )
        if on_reply is not None:
            on_reply(len(replies))

    try:
        async with anyio.create_task_group() as asks:
            for number in range(len(rows)):
                asks.start_soon(ask_one, number)
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    return RoleQuality(
        tuple(score_reply(score, row, replies[number].text, role) for number, row in enumerate(rows)),
        sum(reply.usage.cpu_s for reply in replies.values()),
        sum(reply.usage.output_tokens for reply in replies.values()),
        sum(reply.usage.thinking_tokens for reply in replies.values()),
        sum(reply.usage.decode_s for reply in replies.values()),
    )


def _reply_schema(role: Role, row: TrafficRow) -> dict[str, Any] | None:
    """Schema of a role's reply to a row: with tools, as the step that asked had it, MCP servers' tools apart."""
    schema = answer_schema(role.gives)
    if not role.tools:
        return schema
    earlier = (read_calls(message.content) for message in row.messages if message.role == "assistant")
    made = sum(len(calls.tool_calls) for calls in earlier if calls is not None)
    tools = [each for each in role.tools if isinstance(each, Tool)]
    held: dict[str, Any] = served_schema(turn_schema(tools, schema, role.max_calls - made))
    return held


def paired_interval(scores: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of two variants on the same rows, with its 95 % bootstrap interval."""
    import numpy as np

    differences = np.asarray(scores) - np.asarray(reference)
    draws = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(axis=1), (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)


def score_reply(score: Score, row: TrafficRow, text: str, role: Role) -> float:
    """The score of one reply's text; 0 where it is not of the role's type. Raises: RecipeError as `measure_role`."""
    try:
        called = read_calls(text) if role.tools else None
        answer = parse_answer(text, role.gives) if called is None else called
    except AnswerError:
        return 0.0
    try:
        value = float(score(row, answer))
    except Exception as error:
        raise RecipeError(
            f"the score of role {row.role!r} raised {type(error).__name__}: {error}",
            expected="a function of the row and the answer",
            remedy="Correct it; an answer that is wrong should score 0.",
        ) from error
    if not 0.0 <= value <= 1.0:  # also catches NaN
        raise RecipeError(f"the score of role {row.role!r} gave {value}", expected="a number from 0 to 1")
    return value
