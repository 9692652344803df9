"""Traffic: the asks and replies of runs, as JSONL rows that recipes and probes read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field

from .errors import TaskSetError
from .frozen_model import FrozenModel
from .messages import Message
from .prompts import layout_of
from .record_files import read_records
from .whole_files import whole_file

__all__ = ["TrafficRow", "data_fingerprint", "read_traffic", "write_traffic"]


class TrafficRow(FrozenModel):
    """One ask and its reply, with the score of its run.

    >>> from metier.agents import Message
    >>> question = Message(role="user", content="What is 2 + 2?")
    >>> row = TrafficRow(role="solver", messages=(question,), reply='{"value": 4}', score=1.0, task="2 + 2")
    >>> row.thinking is None
    True
    """

    role: str
    """Role that asked."""

    messages: tuple[Message, ...]
    """The prompt."""

    reply: str
    """The answer alone."""

    thinking: str | None = None
    """The thinking before it, without tags. Empty for an ask with thinking off, None for one without a thinking
    profile that did not think."""

    score: float | None = None
    """Score that its run, or its teacher, earned. 1.0 is solved, None is not scored."""

    run_id: str = ""
    """The run that asked."""

    step_path: str = ""
    """Path of the step that asked."""

    variant: str | None = None
    """Variant that answered. None is the base."""

    prompt_layout: int = Field(default_factory=lambda row: layout_of(row.get("messages", ())))
    """Version of the prompt layout that the messages have: the first one with their text (`prompt_layout`)."""

    task: str = ""
    """The run's input as text (`task_text`). Empty where it is not known."""


def write_traffic(path: Path, rows: Iterable[TrafficRow]) -> int:
    """Write rows as JSONL and return how many; the file appears whole or not at all."""
    count = 0
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(row.model_dump_json() + "\n")
            count += 1
    return count


def read_traffic(path: Path) -> Iterator[TrafficRow]:
    """Read rows one at a time; raises TaskSetError when there is no such file, and with a line that is not a row."""
    return read_records(
        path,
        TrafficRow,
        TaskSetError,
        what="traffic row",
        expected="a JSON line with role, messages and reply for each ask, as `metier run` exports it",
        remedy="Export the traffic again, or remove the line.",
    )


def data_fingerprint(rows: Iterable[TrafficRow]) -> str:
    """Name of training data by content: 16 hex digits over what is trained on, in order; empty for no rows."""
    rows = list(rows)
    if not rows:
        return ""
    digest = hashlib.sha256()
    for row in rows:
        # Rows without a task or thinking keep the name they had before these were recorded.
        fields = {"role", "messages", "reply", "prompt_layout"}
        fields |= {name for name, unsaid in (("task", ""), ("thinking", None)) if getattr(row, name) != unsaid}
        digest.update(row.model_dump_json(include=fields).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]
