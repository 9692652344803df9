"""What one run did, as it is shown to people: its steps, and what each asked and was answered, from the store alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...agents.errors import ResumeError
from ..settings.report import ReportSettings
from ..store.records import RunRecord
from ..store.store import RunStore
from .ledger import BASE

__all__ = ["ShownAsk", "ShownQuestion", "ShownRun", "ShownStep", "in_order_of_need", "shown_run", "unsolved"]

SOLVED = 1.0


@dataclass(frozen=True)
class ShownAsk:
    """One ask and its reply; `reason` is why this variant was asked, `error` what was wrong with the reply."""

    attempt: int
    variant: str
    engine: str
    reason: str
    messages: tuple[dict[str, str], ...]
    thinking: str
    reply: str
    error: str | None
    prompt_tokens: int
    cached_tokens: int
    thinking_tokens: int
    answer_tokens: int
    seconds: float
    cpu_s: float


@dataclass(frozen=True)
class ShownStep:
    """One step, or a role's call of a `tool`; `output` is JSON text."""

    path: str
    role: str
    tool: str
    state: str
    tries: int
    seconds: float
    output: str | None
    error: str | None
    asks: tuple[ShownAsk, ...]


@dataclass(frozen=True)
class ShownQuestion:
    """A question to a person, with the shape of its answer, and the answer where there is one."""

    path: str
    question: str
    gives: str
    answer: str | None
    asked_at: float


@dataclass(frozen=True)
class ShownRun:
    """One run. `input` and `output` are JSON text, `expected` is what the scorer judges by, as text."""

    run: str
    batch: str
    label: str
    workflow: str
    task: str | None
    state: str
    score: float | None
    seconds: float
    input: str
    expected: str | None
    output: str | None
    error: str | None
    steps: tuple[ShownStep, ...]
    questions: tuple[ShownQuestion, ...]
    asks_left_out: int = 0

    def at(self, step: str) -> ShownRun:
        """The same with one step only, and what is inside it; raises ResumeError naming the steps there are."""
        inside = tuple(one for one in self.steps if one.path == step or one.path.startswith((f"{step}/", f"{step}#")))
        if not inside:
            raise ResumeError(
                f"run {self.run} has no step {step!r}",
                expected=f"one of {', '.join(one.path for one in self.steps) or 'none: nothing has ended yet'}",
            )
        return replace(self, steps=inside)

    def data(self) -> dict[str, Any]:
        """The same as JSON data; NaN and infinity, which JSON has not, are null."""
        found = asdict(self)
        for part in (found, *found["steps"], *found["questions"]):
            for name in {"input", "output", "answer"} & part.keys():
                part[name] = None if part[name] is None else _value(part[name])
        return found


def shown_run(store: RunStore, run_id: str, settings: ReportSettings) -> ShownRun:
    """Read one run; raises ResumeError when there is none of that id.

    Texts longer than `settings.text_characters` are cut, and asks beyond `settings.most_asks` left out.
    """
    run = store.run(run_id)
    batch = store.batch(run.batch)
    most = settings.text_characters
    rows = store.query("SELECT * FROM asks WHERE run = ? ORDER BY asked_at, rowid", run_id)
    asks: dict[str, list[ShownAsk]] = {}
    with store.decoding():
        for row in rows[: settings.most_asks]:
            asks.setdefault(row["path"], []).append(_ask(row, most))
    steps = store.query("SELECT * FROM steps WHERE run = ? ORDER BY started_at, path", run_id)
    questions = store.query("SELECT * FROM questions WHERE run = ? ORDER BY asked_at, path", run_id)
    shown = [_step(row, asks.pop(row["path"], []), most) for row in steps]
    # A step that has not ended may have asked: one with tools, or one that was killed.
    shown += [
        ShownStep(path, _role(rows, path), "", "begun", 1, 0.0, None, None, tuple(own)) for path, own in asks.items()
    ]
    return ShownRun(
        run.id,
        run.batch,
        batch.label,
        batch.graph,
        run.task,
        run.state,
        run.score,
        run.busy_s,
        _cut(run.input, most),
        None if run.expected is None else _cut(run.expected, most),
        None if run.output is None else _cut(run.output, most),
        run.error,
        tuple(shown),
        tuple(
            ShownQuestion(q["path"], _cut(q["question"], most), q["gives"], q["answer"], q["asked_at"])
            for q in questions
        ),
        max(len(rows) - settings.most_asks, 0),
    )


def unsolved(run: RunRecord) -> bool:
    """Whether a run failed, waits, or was scored below 1."""
    return run.state != "finished" or (run.score is not None and run.score < SOLVED)


def in_order_of_need(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs that failed or were not solved first, otherwise as they were."""
    return sorted(runs, key=lambda run: not unsolved(run))


def _ask(row: Any, most: int) -> ShownAsk:
    return ShownAsk(
        row["attempt"],
        row["variant"] or BASE,
        row["engine"],
        row["reason"],
        tuple({"role": m["role"], "content": _cut(m["content"], most)} for m in json.loads(row["messages"])),
        _cut(row["thinking"], most),
        _cut(row["reply"], most),
        row["error"],
        row["prompt_tokens"],
        row["cached_tokens"],
        row["thinking_tokens"],
        row["answer_tokens"],
        max(row["answered_at"] - row["asked_at"], 0.0),
        row["cpu_s"],
    )


def _step(row: Any, asks: list[ShownAsk], most: int) -> ShownStep:
    seconds = max(row["finished_at"] - row["started_at"], 0.0) if row["finished_at"] else 0.0
    output = None if row["output"] is None else _cut(row["output"], most)
    own = (row["path"], row["role"], row["tool"], row["state"], row["tries"])
    return ShownStep(*own, seconds, output, row["error"], tuple(asks))


def _role(rows: Sequence[Any], path: str) -> str:
    return next((row["role"] for row in rows if row["path"] == path), "")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} more characters)"


def _value(text: str) -> Any:
    """A recorded value, or its text where that was cut off."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except ValueError:
        return text
