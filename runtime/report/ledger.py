"""What a report knows of one batch, read from the store once: asks, steps, runs, and what the engines did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...agents.graphs.step_paths import StepPath
from ...agents.graphs.workflow_shape import WorkflowShape, read_shape
from ..meters.energy import Energy
from ..store.records import BatchRecord, RunRecord
from ..store.store import RunStore

__all__ = ["AskEntry", "CallEntry", "Ledger", "SlotEvent", "StepEntry", "read_ledger"]

BASE = "base"
SLOT_EVENTS = ("adapter_loaded", "adapter_evicted")

USED = (
    "run", "path", "attempt", "role", "prompt_tokens", "cached_tokens", "thinking_tokens", "answer_tokens", "queue_s",
    "slot_wait_s", "prefill_s", "decode_s", "cpu_s", "swaps", "swap_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AskEntry:
    """One ask, or (`abandoned`) what one had used that got no reply; tokens and seconds as in `Usage`.

    `corrected` says that its reply did not fit its type, `lost` that it got none. Times are seconds since 1970.
    """

    run: str
    path: str
    attempt: int
    role: str
    variant: str
    prompt_tokens: int
    cached_tokens: int
    thinking_tokens: int
    answer_tokens: int
    queue_s: float
    slot_wait_s: float
    prefill_s: float
    decode_s: float
    cpu_s: float
    swaps: int
    swap_s: float
    asked_at: float = 0.0
    answered_at: float = 0.0
    engine: str = ""
    corrected: bool = False
    lost: bool = False
    abandoned: bool = False

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.prompt_tokens + self.thinking_tokens + self.answer_tokens

    @property
    def service_s(self) -> float:
        """What the engine took for it, waiting apart."""
        return self.prefill_s + self.decode_s


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One step of a run: a role's, or a function's (`role` is ""). Calls of tools are not among them."""

    run: str
    path: str
    role: str
    state: str
    tries: int
    started_at: float
    finished_at: float


@dataclass(frozen=True, slots=True)
class CallEntry:
    """One call of a tool; `path` is that of the step that made it, `open` says that its result is not known."""

    run: str
    path: str
    tool: str
    started_at: float
    finished_at: float
    failed: bool
    open: bool

    @property
    def seconds(self) -> float:
        """How long it took; 0 while that is not known."""
        return 0.0 if self.open else self.finished_at - self.started_at


@dataclass(frozen=True, slots=True)
class SlotEvent:
    """An adapter that came into an engine's slots or left them; `at` is when that was done, `seconds` what it took."""

    at: float
    loaded: bool
    adapter: str
    engine: str
    seconds: float


@dataclass(frozen=True)
class Ledger:
    """All of one batch of the run store `store`.

    `asks` are those that were recorded with their steps, `abandoned` what got no reply.
    """

    store: str
    batch: BatchRecord
    shape: WorkflowShape | None
    runs: tuple[RunRecord, ...]
    steps: tuple[StepEntry, ...]
    asks: tuple[AskEntry, ...]
    abandoned: tuple[AskEntry, ...]
    slot_events: tuple[SlotEvent, ...]
    restarts: int
    totals: dict[str, dict[str, Any]]
    energy: Energy | None
    questions: int
    calls: tuple[CallEntry, ...] = ()

    @property
    def spent(self) -> tuple[AskEntry, ...]:
        """Everything that used something: asks, and what was given up."""
        return (*self.asks, *self.abandoned)

    @cached_property
    def solved_runs(self) -> frozenset[str]:
        """Runs with a score of 1."""
        return frozenset(run.id for run in self.runs if run.score is not None and run.score >= 1.0)

    @cached_property
    def scored_runs(self) -> frozenset[str]:
        """Runs with a score."""
        return frozenset(run.id for run in self.runs if run.score is not None)


def read_ledger(store: RunStore, batch: str) -> Ledger:
    """Read one batch; raises ResumeError when there is none of that id."""
    record = store.batch(batch)
    mine = "JOIN runs ON runs.id = {0}.run WHERE runs.batch = ?"
    asks = store.query(
        f"SELECT {_of('asks')}, asks.asked_at, {_ended('asks.asked_at', 'asks.answered_at')}, asks.engine, "
        "asks.error IS NOT NULL AND finish_reason != '' AS corrected, finish_reason = '' AS lost "
        f"FROM asks {mine.format('asks')} ORDER BY asks.asked_at, asks.rowid",
        batch,
    )
    abandoned = store.query(f"SELECT {_of('abandoned')} FROM abandoned {mine.format('abandoned')}", batch)
    steps = store.query(
        "SELECT run, path, role, steps.state AS state, tries, steps.started_at AS started_at, "
        f"{_ended('steps.started_at', 'steps.finished_at')} FROM steps {mine.format('steps')} AND tool = '' "
        "ORDER BY steps.started_at",
        batch,
    )
    calls = store.query(
        f"SELECT run, path, tool, steps.started_at AS started_at, {_ended('steps.started_at', 'steps.finished_at')}, "
        "steps.error IS NOT NULL AS failed, steps.state = 'begun' AS open "
        f"FROM steps {mine.format('steps')} AND tool != '' ORDER BY steps.started_at",
        batch,
    )
    events = store.query("SELECT at, kind, data FROM engine_events WHERE batch = ? ORDER BY at", batch)
    drawn = store.query("SELECT seconds, joules, zones FROM energy WHERE batch = ?", batch)
    waiting = store.query(f"SELECT count(*) AS n FROM questions {mine.format('questions')} AND answer IS NULL", batch)
    with store.decoding():
        return Ledger(
            store=store.path,
            batch=record,
            shape=read_shape(record.shape),
            runs=tuple(store.runs(batch)),
            steps=tuple(StepEntry(**dict(row)) for row in steps),
            asks=tuple(_ask(row) for row in asks),
            abandoned=tuple(AskEntry(**dict(row), abandoned=True) for row in abandoned),
            slot_events=tuple(_slot_event(row) for row in events if row["kind"] in SLOT_EVENTS),
            restarts=sum(row["kind"] == "engine_restarted" for row in events),
            totals=store.engine_totals(batch),
            energy=_sum_energy([dict(row) for row in drawn]),
            questions=waiting[0]["n"],
            calls=tuple(_call(row) for row in calls),
        )


def _of(table: str) -> str:
    return f"coalesce({table}.variant, '{BASE}') AS variant, " + ", ".join(f"{table}.{column}" for column in USED)


def _ended(began: str, ended: str) -> str:
    """The column of an end, which is never before its beginning: older stores have stamps of a clock that was set."""
    return f"max({began}, {ended}) AS {ended.partition('.')[2]}"


def _ask(row: Any) -> AskEntry:
    values = dict(row)
    return AskEntry(**{**values, "corrected": bool(values["corrected"]), "lost": bool(values["lost"])})


def _call(row: Any) -> CallEntry:
    values = dict(row)
    step = str(StepPath.parse(values["path"]).parent)
    return CallEntry(**{**values, "path": step, "failed": bool(values["failed"]), "open": bool(values["open"])})


def _slot_event(row: Any) -> SlotEvent:
    data = json.loads(row["data"])
    return SlotEvent(row["at"], row["kind"] == "adapter_loaded", data["adapter"], data["engine"], data["seconds"])


def _sum_energy(rows: list[dict[str, Any]]) -> Energy | None:
    if not rows:
        return None
    zones = {zone for row in rows for zone in json.loads(row["zones"])}
    return Energy(sum(r["seconds"] for r in rows), sum(r["joules"] for r in rows), tuple(sorted(zones)))
