"""What the run store keeps: records of batches, runs, steps and asks, and the tables they live in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ...agents.messages import Message, Usage
from ...agents.thinking import ThinkingProfile

__all__ = [
    "CONVERSATION",
    "MIGRATIONS",
    "WITH_BASE",
    "AskRecord",
    "BatchRecord",
    "OpenQuestion",
    "RunRecord",
    "RunState",
    "StepRecord",
    "StepState",
]

RunState = Literal["waiting", "running", "finished", "failed", "interrupted", "stopped"]
StepState = Literal["done", "skipped", "failed", "begun"]

CONVERSATION = "conversation"
"""Option of a batch that is a conversation, with the name of the role it is with, "" for a workflow."""
WITH_BASE = "with_base"
"""Option of a conversation that `metier chat` has with the base itself, without a workflow."""


@dataclass(frozen=True)
class BatchRecord:
    """Runs that belong together: one `run` or `map` call of one workflow.

    `options` is what is needed to go on after a crash (workflow file, task set, base, assignment, settings);
    `picture` is the workflow as Mermaid text, `shape` the same as JSON (`workflow_shape`), "" in stores from before it.
    """

    id: str
    label: str
    graph: str
    fingerprint: str
    picture: str
    options: dict[str, Any]
    created_at: float
    shape: str = ""


@dataclass(frozen=True)
class RunRecord:
    """One run as it stands in the store; `output`, `input` are JSON text. `expected` is what its task's scorer judges
    by, as text to be shown; None where the task has no key."""

    id: str
    batch: str
    task: str | None
    input: str
    seed: int
    state: RunState = "waiting"
    output: str | None = None
    error: str | None = None
    score: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    busy_s: float = 0.0
    expected: str | None = None


@dataclass(frozen=True)
class OpenQuestion:
    """A question that a run waits for; `gives` is the shape of its answer in words, `asked_at` seconds since 1970."""

    run: str
    batch: str
    path: str
    question: str
    gives: str
    asked_at: float


@dataclass
class AskRecord:
    """One ask of a step, with its reply, what was thought before it within which profile, and what it cost."""

    attempt: int
    role: str
    variant: str | None
    reason: str
    prompt_layout: int
    messages: tuple[Message, ...]
    asked_at: float
    answered_at: float = 0.0
    reply: str = ""
    thinking: str = ""
    profile: ThinkingProfile | None = None
    finish_reason: str = ""
    error: str | None = None
    engine: str = ""
    usage: Usage = field(default_factory=Usage)


@dataclass
class StepRecord:
    """One step of a run, or a role's call of a `tool`; `content_key` hashes what it was given, as a check on resume.

    A call that must not be repeated is recorded as `begun` before it is made. One that failed is done, with its error.
    """

    path: str
    role: str
    state: StepState
    output: str | None
    content_key: str
    started_at: float
    finished_at: float = 0.0
    error: str | None = None
    tries: int = 1
    tool: str = ""
    asks: list[AskRecord] = field(default_factory=list)


MIGRATIONS = (
    """
    CREATE TABLE batches (
        id TEXT PRIMARY KEY, label TEXT NOT NULL, graph TEXT NOT NULL, fingerprint TEXT NOT NULL,
        picture TEXT NOT NULL, options TEXT NOT NULL, created_at REAL NOT NULL);
    CREATE TABLE runs (
        id TEXT PRIMARY KEY, batch TEXT NOT NULL REFERENCES batches (id), task TEXT, input TEXT NOT NULL,
        seed INTEGER NOT NULL, state TEXT NOT NULL, output TEXT, error TEXT, score REAL, started_at REAL,
        finished_at REAL, busy_s REAL NOT NULL DEFAULT 0);
    CREATE INDEX runs_by_batch ON runs (batch);
    CREATE TABLE steps (
        run TEXT NOT NULL REFERENCES runs (id), path TEXT NOT NULL, role TEXT NOT NULL, state TEXT NOT NULL,
        output TEXT, content_key TEXT NOT NULL, error TEXT, tries INTEGER NOT NULL, started_at REAL NOT NULL,
        finished_at REAL NOT NULL, PRIMARY KEY (run, path)) WITHOUT ROWID;
    CREATE TABLE asks (
        run TEXT NOT NULL REFERENCES runs (id), path TEXT NOT NULL, attempt INTEGER NOT NULL, role TEXT NOT NULL,
        variant TEXT, reason TEXT NOT NULL, prompt_layout INTEGER NOT NULL, messages TEXT NOT NULL,
        reply TEXT NOT NULL, finish_reason TEXT NOT NULL, error TEXT, asked_at REAL NOT NULL,
        answered_at REAL NOT NULL, engine TEXT NOT NULL,
        prompt_tokens INTEGER, cached_tokens INTEGER, thinking_tokens INTEGER, answer_tokens INTEGER,
        queue_s REAL, prefill_s REAL, decode_s REAL, cpu_s REAL, swaps INTEGER, swap_s REAL,
        PRIMARY KEY (run, path, attempt));
    CREATE TABLE abandoned (
        run TEXT NOT NULL REFERENCES runs (id), path TEXT NOT NULL, attempt INTEGER NOT NULL, role TEXT NOT NULL,
        variant TEXT, prompt_tokens INTEGER, cached_tokens INTEGER, thinking_tokens INTEGER, answer_tokens INTEGER,
        queue_s REAL, prefill_s REAL, decode_s REAL, cpu_s REAL, swaps INTEGER, swap_s REAL);
    CREATE TABLE questions (
        run TEXT NOT NULL REFERENCES runs (id), path TEXT NOT NULL, question TEXT NOT NULL, answer TEXT,
        PRIMARY KEY (run, path)) WITHOUT ROWID;
    CREATE TABLE engine_events (at REAL NOT NULL, batch TEXT NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL);
    CREATE TABLE engine_totals (
        batch TEXT NOT NULL, engine TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (batch, engine));
    """,
    """
    ALTER TABLE asks ADD COLUMN thinking TEXT NOT NULL DEFAULT '';
    ALTER TABLE asks ADD COLUMN thinking_profile TEXT;
    """,
    """
    ALTER TABLE batches ADD COLUMN shape TEXT NOT NULL DEFAULT '';
    ALTER TABLE asks ADD COLUMN slot_wait_s REAL NOT NULL DEFAULT 0;
    ALTER TABLE abandoned ADD COLUMN slot_wait_s REAL NOT NULL DEFAULT 0;
    CREATE TABLE energy (batch TEXT NOT NULL, seconds REAL NOT NULL, joules REAL NOT NULL, zones TEXT NOT NULL);
    CREATE INDEX energy_by_batch ON energy (batch);
    CREATE INDEX engine_events_by_batch ON engine_events (batch);
    """,
    """
    ALTER TABLE steps ADD COLUMN tool TEXT NOT NULL DEFAULT '';
    """,
    """
    ALTER TABLE questions ADD COLUMN gives TEXT NOT NULL DEFAULT '';
    ALTER TABLE questions ADD COLUMN asked_at REAL NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN expected TEXT;
    """,
    """
    CREATE TABLE responses (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, created_at REAL NOT NULL, messages TEXT NOT NULL,
        body TEXT NOT NULL);
    CREATE INDEX responses_by_time ON responses (created_at);
    """,
)
"""Append only: a store written by an older version is brought up to date when it is opened."""
