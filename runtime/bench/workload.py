"""What a benchmark asks: conversations from a run store, from a traffic file, or made up to given lengths."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic import Field

from ...agents.errors import TaskSetError
from ...agents.frozen_model import FrozenModel
from ...agents.messages import Ask, Message
from ...agents.prompts import PROMPT_LAYOUT, task_text_of_json
from ...agents.thinking import ThinkingProfile
from ...agents.traffic import read_traffic
from ..store.store import RunStore

__all__ = ["Conversation", "SyntheticMix", "from_store", "from_traffic", "synthetic", "variants_of"]

WORDS = (
    "plan solve check answer number puzzle legs dogs spiders ducks add take twice half total count each more less "
    "because first then finally write sum result wrong right again value apples pears boxes shelves"
).split()


@dataclass(frozen=True)
class Conversation:
    """Asks that follow one another: a run's in the order it made them, or a single one."""

    id: str
    asks: tuple[Ask, ...]


class SyntheticMix(FrozenModel):
    """Requests made up from common words. Every length is drawn evenly between two bounds."""

    requests: int = Field(default=64, ge=1)
    """How many."""

    shared_words: int = Field(default=32, ge=0)
    """Words of the text that a request begins with, as asks of one role do, so that a prefix cache has something to
    find."""

    prefixes: int = Field(default=4, ge=1)
    """How many such texts there are."""

    input_words: tuple[int, int] = (16, 64)
    """Fewest and most words of a request after that."""

    output_tokens: tuple[int, int] = (16, 48)
    """Fewest and most tokens that an answer may have."""

    variants: tuple[str, ...] = ("base",)
    """Variants (`base` is one) that take turns."""

    seed: int = 0
    """Seed of words and lengths."""


def from_store(store: RunStore, batch: str) -> list[Conversation]:
    """Every run of a batch as one conversation: the same prompts, variants and thinking, in the order they were asked.

    The store does not keep answer schemas, so answers are bounded by the number of tokens they had, and end earlier
    where the model ends them. Asks that got no reply are left out. Raises: ResumeError when there is no such batch,
    TaskSetError when it has asked nothing, or of another prompt layout.
    """
    store.batch(batch)
    rows = store.query(
        "SELECT asks.*, runs.input AS input FROM asks JOIN runs ON runs.id = asks.run "
        "WHERE runs.batch = ? AND finish_reason != '' ORDER BY runs.rowid, asked_at, asks.rowid",
        batch,
    )
    asks = []
    for row in rows:
        _check_layout(row["prompt_layout"], f"batch {batch}")
        profile = row["thinking_profile"]
        asks.append(
            Ask(
                run_id=row["run"],
                step_path=row["path"],
                attempt=row["attempt"],
                role=row["role"],
                variant=row["variant"],
                messages=tuple(Message.model_validate(message) for message in json.loads(row["messages"])),
                max_tokens=max(row["answer_tokens"], 1),
                thinking=None if profile is None else ThinkingProfile.model_validate_json(profile),
                task=task_text_of_json(row["input"]),
            )
        )
    return _conversations(asks, f"batch {batch}")


def from_traffic(path: Path, max_tokens: int) -> list[Conversation]:
    """The runs of a traffic file; answers have at most `max_tokens`, since the file does not say how long they were.

    Raises: TaskSetError for a file of another version (unknown fields, another prompt layout), or without rows.
    """
    asks = []
    for number, row in enumerate(read_traffic(path)):
        _check_layout(row.prompt_layout, str(path))
        asks.append(
            Ask(
                run_id=row.run_id or f"row-{number}",
                step_path=row.step_path or f"row-{number}",
                role=row.role,
                variant=row.variant,
                messages=row.messages,
                max_tokens=max_tokens,
                task=row.task,
            )
        )
    asks.sort(key=lambda ask: ask.run_id)  # stable: within a run the order stays
    return _conversations(asks, str(path))


def synthetic(mix: SyntheticMix) -> list[Conversation]:
    """Conversations of one request each; the same mix gives the same requests."""
    draw = random.Random(mix.seed)
    shared = [" ".join(draw.choices(WORDS, k=mix.shared_words)) for _ in range(mix.prefixes)]
    conversations = []
    for number in range(mix.requests):
        variant = mix.variants[number % len(mix.variants)]
        words = " ".join(draw.choices(WORDS, k=draw.randint(*mix.input_words)))
        prefix = shared[number % len(shared)]
        ask = Ask(
            run_id=f"synthetic-{number}",
            step_path="ask",
            role=variant,
            variant=None if variant == "base" else variant,
            messages=(Message(role="user", content=f"{prefix} {words}".strip() or "?"),),
            max_tokens=draw.randint(*mix.output_tokens),
            task=words,
        )
        conversations.append(Conversation(ask.run_id, (ask,)))
    return conversations


def variants_of(conversations: Iterable[Conversation]) -> list[str]:
    """Every variant that is asked for, by name."""
    return sorted({ask.variant for one in conversations for ask in one.asks if ask.variant is not None})


def _check_layout(layout: int, origin: str) -> None:
    if layout > PROMPT_LAYOUT:
        raise TaskSetError(
            f"{origin} was recorded with prompt layout {layout}",
            expected=f"at most layout {PROMPT_LAYOUT}, this version's",
            remedy="Run the workflow again with this version and replay that.",
        )


def _conversations(asks: Sequence[Ask], origin: str) -> list[Conversation]:
    if not asks:
        raise TaskSetError(f"{origin} holds no asks", expected="a trace with asks that were answered")
    return [Conversation(run, tuple(of_run)) for run, of_run in groupby(asks, key=lambda ask: ask.run_id)]
