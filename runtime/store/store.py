"""The run store: every run, step and ask in one SQLite file, so that runs survive and reports need nothing else.

A step is recorded in one transaction together with its asks. Writes happen where they are called, in the event
loop's thread: a commit in write-ahead mode takes some tens of microseconds, less than handing it to a thread.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...agents.errors import ResumeError, RunTakenError, StoreError
from ...agents.messages import Ask, Message, Usage
from ...agents.prompts import task_text_of_json
from ...agents.traffic import TrafficRow
from ..meters.energy import Energy
from ..meters.stamps import stamp_s
from .claims import RunClaims
from .records import AskRecord, BatchRecord, OpenQuestion, RunRecord, RunState, StepRecord
from .store_file import StoreFile

__all__ = ["RunStore"]

USAGE_COLUMNS = tuple(Usage.model_fields)


class RunStore(StoreFile):
    """One SQLite file of runs; `":memory:"` keeps them for the session only.

    Raises StoreError when the file cannot be opened, was written by a newer version, or the disk is full.

    >>> with RunStore(":memory:") as store:
    ...     store.batches()
    []
    """

    def __init__(self, path: Path | str) -> None:
        self._claims = RunClaims(None if str(path) == ":memory:" else Path(f"{path}-claims"))
        super().__init__(path)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._claims.close()
        super().close()

    # --- runs ---------------------------------------------------------------------------------------------

    def add_batch(self, batch: BatchRecord, runs: list[RunRecord]) -> None:
        """Record a batch and all its runs before the first one starts, so that none is lost in a crash."""
        columns = list(RunRecord.__dataclass_fields__)
        with self.transaction() as db:
            db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    batch.id, batch.label, batch.graph, batch.fingerprint, batch.picture,
                    json.dumps(batch.options), batch.created_at, batch.shape,
                ),
            )  # fmt: skip
            db.executemany(_insert("runs", columns), [[getattr(run, c) for c in columns] for run in runs])

    def add_turn(self, run: RunRecord, earlier: int) -> None:
        """Add the next run to a batch that has `earlier` runs.

        Raises: RunTakenError when it has others by now, which another process has added.
        """
        columns = list(RunRecord.__dataclass_fields__)
        with self.transaction() as db:
            (there,) = db.execute("SELECT count(*) FROM runs WHERE batch = ?", (run.batch,)).fetchone()
            if there == earlier:
                db.execute(_insert("runs", columns), [getattr(run, column) for column in columns])
        if there != earlier:
            raise RunTakenError(
                f"conversation {run.batch} has {there} turns by now, and had {earlier} here",
                expected="one process at a conversation",
                remedy="Open it again: it goes on behind what was said elsewhere.",
            )

    def end_run(
        self,
        run_id: str,
        state: RunState,
        *,
        output: str | None = None,
        error: str | None = None,
        score: float | None = None,
        busy_s: float = 0.0,
    ) -> None:
        """Record how a run ended and its score, or that it waits; seconds add up over resumes."""
        with self.transaction() as db:
            db.execute(
                "UPDATE runs SET state = ?, output = ?, error = ?, score = ?, finished_at = ?, busy_s = busy_s + ? "
                "WHERE id = ?",
                (state, output, _writable(error), score, stamp_s(), busy_s, run_id),
            )

    @contextmanager
    def claim(self, run_id: str) -> Iterator[None]:
        """Have a run to oneself for the length of the block, so that several drivers may share a store.

        Raises: RunTakenError when another process has it, StoreError when the file of claims cannot be written.
        """
        rows = self.query("SELECT rowid FROM runs WHERE id = ?", run_id)
        with ExitStack() as stack:
            try:
                mine = not rows or stack.enter_context(self._claims.claim(rows[0]["rowid"]))
            except OSError as error:
                raise StoreError(f"{self.path}-claims cannot be locked: {error}", expected="a local disk") from error
            if not mine:
                raise RunTakenError(
                    f"run {run_id} is under way in another process that uses {self.path}",
                    expected="one driver for each run",
                    remedy="Let that one finish, or stop it; then resume the run.",
                )
            yield

    def start_run(self, run_id: str) -> None:
        """Record that a run starts or goes on; its failed steps are forgotten, finished ones kept."""
        with self.transaction() as db:
            begun = "UPDATE runs SET state = 'running', error = NULL, started_at = coalesce(started_at, ?) WHERE id = ?"
            db.execute(begun, (stamp_s(), run_id))
            db.execute("DELETE FROM steps WHERE run = ? AND state = 'failed'", (run_id,))

    def run(self, run_id: str) -> RunRecord:
        """One run; raises ResumeError naming the runs that exist when there is none of that id."""
        rows = self.query("SELECT * FROM runs WHERE id = ?", run_id)
        if not rows:
            known = [r["id"] for r in self.query("SELECT id FROM runs ORDER BY rowid DESC LIMIT 5")]
            raise ResumeError(
                f"no run {run_id!r} in {self.path}",
                expected=f"one of {', '.join(known) or 'none yet'}, …",
                remedy="Name the store it is in with --store.",
            )
        with self.decoding():
            return _run(rows[0])

    def runs(self, batch: str) -> list[RunRecord]:
        """All runs of a batch, in the order of their inputs."""
        rows = self.query("SELECT * FROM runs WHERE batch = ? ORDER BY rowid", batch)
        with self.decoding():
            return [_run(row) for row in rows]

    def batch(self, batch_id: str) -> BatchRecord:
        """One batch; raises ResumeError naming the batches that exist when there is none of that id."""
        found = [batch for batch in self.batches() if batch.id == batch_id]
        if not found:
            known = ", ".join(batch.id for batch in self.batches()[-5:])
            raise ResumeError(
                f"no batch {batch_id!r} in {self.path}",
                expected=f"one of {known or 'none yet'}",
                remedy="Name the store it is in with --store.",
            )
        return found[0]

    def batches(self) -> list[BatchRecord]:
        """All batches, oldest first."""
        rows = self.query("SELECT * FROM batches ORDER BY rowid")
        with self.decoding():
            return [BatchRecord(**{**dict(row), "options": json.loads(row["options"])}) for row in rows]

    # --- steps --------------------------------------------------------------------------------------------

    def record_step(self, run_id: str, step: StepRecord) -> None:
        """Record one step and its asks in one transaction; a finished step is never overwritten."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO steps VALUES (?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET state = excluded.state, "
                "output = excluded.output, content_key = excluded.content_key, error = excluded.error, "
                "tries = excluded.tries, started_at = excluded.started_at, finished_at = excluded.finished_at "
                "WHERE steps.state != 'done'",
                (
                    run_id, step.path, step.role, step.state, step.output, step.content_key,
                    _writable(step.error), step.tries, step.started_at, step.finished_at, step.tool,
                ),
            )  # fmt: skip
            db.executemany(ASK_INSERT, [_ask_values(run_id, step.path, ask) for ask in step.asks])

    def record_asks(self, run_id: str, path: str, asks: list[AskRecord]) -> None:
        """Record asks of a step that goes on: what they made it do comes after, and must find them if it is killed."""
        with self.transaction() as db:
            db.executemany(ASK_INSERT, [_ask_values(run_id, path, ask) for ask in asks])

    def begin_call(self, run_id: str, call: StepRecord) -> None:
        """Record that a call begins which must not be made twice; a question about an earlier try of it is over."""
        with self.transaction() as db:
            db.execute("DELETE FROM questions WHERE run = ? AND path = ?", (run_id, call.path))
        self.record_step(run_id, call)

    def begun_calls(self, run_id: str) -> set[str]:
        """Paths of the calls that were begun, must not be made twice, and have no result."""
        return {row["path"] for row in self.query("SELECT path FROM steps WHERE run = ? AND state = 'begun'", run_id)}

    def replies(self, run_id: str, path: str, *, failed: bool = False) -> list[tuple[tuple[Message, ...], str]]:
        """What a step has asked and was answered, the last first; what did not parse only with `failed`."""
        wanted = "finish_reason != ''" if failed else "error IS NULL"
        sql = f"SELECT messages, reply FROM asks WHERE run = ? AND path = ? AND {wanted} ORDER BY attempt DESC"
        rows = self.query(sql, run_id, path)
        with self.decoding():
            return [(_messages(row["messages"]), row["reply"]) for row in rows]

    def finished_steps(self, run_id: str) -> dict[str, tuple[str | None, str]]:
        """Path → (output as JSON, content key) of every finished step of a run."""
        rows = self.query("SELECT path, output, content_key FROM steps WHERE run = ? AND state = 'done'", run_id)
        return {row["path"]: (row["output"], row["content_key"]) for row in rows}

    def skipped_steps(self, run_id: str) -> frozenset[str]:
        """Paths of the items that failed and that their fan-out went on without."""
        return frozenset(
            r["path"] for r in self.query("SELECT path FROM steps WHERE run = ? AND state = 'skipped'", run_id)
        )

    def next_attempts(self, run_id: str) -> dict[str, int]:
        """Path → first unused attempt number, for steps that a resumed run asks again."""
        rows = self.query("SELECT path, max(attempt) + 1 AS n FROM asks WHERE run = ? GROUP BY path", run_id)
        return {row["path"]: row["n"] for row in rows}

    def record_abandoned(self, ask: Ask, usage: Usage) -> None:
        """Keep what an ask has used that never got its reply, so that the roles' sums stay the engine's."""
        with self.transaction() as db:
            db.execute(
                _insert("abandoned", ["run", "path", "attempt", "role", "variant", *USAGE_COLUMNS]),
                [ask.run_id, ask.step_path, ask.attempt, ask.role, ask.variant]
                + [getattr(usage, column) for column in USAGE_COLUMNS],
            )

    # --- questions to people ------------------------------------------------------------------------------

    def ask_question(self, run_id: str, path: str, question: str, gives: str = "") -> None:
        """Keep a question that a run waits for; `gives` is the shape of its answer in words."""
        columns = ["run", "path", "question", "gives", "asked_at"]
        row = (run_id, path, _writable(question), _writable(gives), stamp_s())
        with self.transaction() as db:
            db.execute(f"{_insert('questions', columns)} ON CONFLICT DO NOTHING", row)

    def open_questions(self) -> list[OpenQuestion]:
        """Every question of the store that waits for a person, the oldest first; those of ended runs wait no more."""
        rows = self.query(
            "SELECT run, batch, path, question, gives, asked_at FROM questions JOIN runs ON runs.id = questions.run "
            "WHERE answer IS NULL AND state != 'finished' ORDER BY asked_at, runs.rowid, path"
        )
        return [OpenQuestion(**dict(row)) for row in rows]

    def questions(self, run_id: str) -> dict[str, tuple[str, str | None]]:
        """Path → (question, answer as JSON or None) of a run."""
        rows = self.query("SELECT path, question, answer FROM questions WHERE run = ?", run_id)
        return {row["path"]: (row["question"], row["answer"]) for row in rows}

    def answer_question(self, run_id: str, path: str, answer: str) -> None:
        """Keep a person's answer (JSON) for when the run is resumed."""
        with self.transaction() as db:
            db.execute("UPDATE questions SET answer = ? WHERE run = ? AND path = ?", (answer, run_id, path))

    # --- engines, traffic, reading --------------------------------------------------------------------------

    def record_engine_event(self, batch: str, kind: str, data: dict[str, Any]) -> None:
        """Keep what an engine did (adapter loaded, evicted, restarted) for the report."""
        with self.transaction() as db:
            db.execute("INSERT INTO engine_events VALUES (?, ?, ?, ?)", (stamp_s(), batch, kind, json.dumps(data)))

    def record_engine_totals(self, batch: str, engine: str, totals: dict[str, Any]) -> None:
        """Keep an engine's own totals (CPU-seconds, tokens, steps) beside what was charged to asks."""
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO engine_totals VALUES (?, ?, ?)", (batch, engine, json.dumps(totals)))

    def engine_totals(self, batch: str) -> dict[str, dict[str, Any]]:
        """Engine name → its totals of one batch."""
        rows = self.query("SELECT engine, data FROM engine_totals WHERE batch = ?", batch)
        with self.decoding():
            return {row["engine"]: json.loads(row["data"]) for row in rows}

    def record_energy(self, batch: str, energy: Energy) -> None:
        """Keep what the machine drew while a batch ran; a resumed batch has several such spans, which add up."""
        with self.transaction() as db:
            row = (batch, energy.seconds, energy.joules, json.dumps(energy.zones))
            db.execute("INSERT INTO energy VALUES (?, ?, ?, ?)", row)

    def traffic(self, batch: str | None = None) -> Iterator[TrafficRow]:
        """What the runs asked and were answered, with the score of their run."""
        where, values = ("AND runs.batch = ?", (batch,)) if batch else ("", ())
        rows = self.query_in_pieces(
            "SELECT asks.*, runs.score AS score, runs.input AS input FROM asks JOIN runs ON runs.id = asks.run "
            f"WHERE asks.error IS NULL {where} ORDER BY asks.asked_at, asks.rowid",
            *values,
        )
        for row in rows:
            with self.decoding():
                known = _traffic_row(row)
            yield known


def _run(row: sqlite3.Row) -> RunRecord:
    """A run; one that a process ended whose clock stood before the start that another recorded has taken no time."""
    run = RunRecord(**dict(row))
    if run.started_at and run.finished_at and run.finished_at < run.started_at:
        return replace(run, finished_at=run.started_at)
    return run


def _traffic_row(row: sqlite3.Row) -> TrafficRow:
    return TrafficRow(
        role=row["role"],
        messages=_messages(row["messages"]),
        reply=row["reply"],
        thinking=row["thinking"] or (None if row["thinking_profile"] is None else ""),
        score=row["score"],
        run_id=row["run"],
        step_path=row["path"],
        variant=row["variant"],
        prompt_layout=row["prompt_layout"],
        task=task_text_of_json(row["input"]),
    )


def _messages(text: str) -> tuple[Message, ...]:
    return tuple(Message.model_validate(message) for message in json.loads(text))


_ASK_COLUMNS = [
    "run", "path", "attempt", "role", "variant", "reason", "prompt_layout", "messages", "reply", "finish_reason",
    "error", "asked_at", "answered_at", "engine", *USAGE_COLUMNS, "thinking", "thinking_profile",
]  # fmt: skip


def _insert(table: str, columns: list[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


ASK_INSERT = _insert("asks", _ASK_COLUMNS)


def _writable(text: str | None) -> str | None:
    """Text with halves of surrogate pairs, which no file can hold, written as escapes."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _ask_values(run_id: str, path: str, ask: AskRecord) -> list[Any]:
    messages = json.dumps([{"role": m.role, "content": m.content} for m in ask.messages])
    return [
        run_id, path, ask.attempt, ask.role, ask.variant, ask.reason, ask.prompt_layout, messages, _writable(ask.reply),
        ask.finish_reason, _writable(ask.error), ask.asked_at, ask.answered_at, _writable(ask.engine),
        *(getattr(ask.usage, column) for column in USAGE_COLUMNS),
        _writable(ask.thinking), None if ask.profile is None else ask.profile.model_dump_json(),
    ]  # fmt: skip
