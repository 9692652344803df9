"""The run store: every run, step and ask in one SQLite file, so that runs survive and reports need nothing else.

A step is recorded in one transaction together with its asks. Writes happen where they are called, in the event
loop's thread: a commit in write-ahead mode takes some tens of microseconds, less than handing it to a thread.
"""

from __future__ import annotations

import json
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from ...agents.errors import ResumeError, RunTakenError, StoreError
from ...agents.messages import Ask, Message, Usage
from ...agents.prompts import task_text_of_json
from ...agents.traffic import TrafficRow
from ..meters.energy import Energy
from .claims import RunClaims
from .commands import command
from .records import MIGRATIONS, AskRecord, BatchRecord, RunRecord, RunState, StepRecord

__all__ = ["RunStore"]

USAGE_COLUMNS = tuple(Usage.model_fields)
OPENING_S, AGAIN_S = 10.0, 0.01
"""How long a store that others are just opening is asked for, and how often."""

UNREADABLE = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises on a damaged file: its own errors, or a message that quotes bytes which are no text."""


class RunStore:
    """One SQLite file of runs; `":memory:"` keeps them for the session only.

    Raises StoreError when the file cannot be opened, was written by a newer version, or the disk is full.

    >>> with RunStore(":memory:") as store:
    ...     store.batches()
    []
    """

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self._claims = RunClaims(None if self.path == ":memory:" else Path(f"{self.path}-claims"))
        try:
            if self.path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._write_ahead()
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._migrate()
        except (*UNREADABLE, OSError) as error:
            raise StoreError(
                f"the run store {self.path} cannot be opened: {error}",
                expected="a SQLite file of this program, in a folder that can be written",
                remedy=f"Name another file with --store, or see what is damaged with `{self._check_command()}`.",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._claims.close()
        self._db.close()

    def _write_ahead(self) -> None:
        """Turn write-ahead mode on. SQLite's own waiting leaves this statement out: two who begin would deadlock."""
        until = time.monotonic() + OPENING_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
            time.sleep(AGAIN_S)

    def _migrate(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the run store {self.path} has schema {version}",
                expected=f"at most {len(MIGRATIONS)}",
                remedy="Update metier, or name another file with --store.",
            )
        if version == len(MIGRATIONS):
            return
        with self._transaction() as db:
            # Read once more: another process may have brought it up to date while this one waited.
            version = db.execute("PRAGMA user_version").fetchone()[0]
            for statement in "".join(MIGRATIONS[version:]).split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {max(version, len(MIGRATIONS))}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled back by itself
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except (UnicodeEncodeError, OverflowError) as error:
            raise StoreError(
                f"the run store {self.path} cannot hold a value: {error}",
                expected="text that can be written as UTF-8, and integers below 2^63",
                remedy="Look at the step or the options it comes from.",
            ) from error
        except UNREADABLE as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(str(error))
        if code == sqlite3.SQLITE_CONSTRAINT:
            return StoreError(
                f"the run store {self.path} refuses a row: {error}",
                expected="each ask and each run once",
                remedy="This is a fault of metier; please report it. What was recorded is kept.",
            )
        resume = command("resume", store=self.path)
        return StoreError(
            f"the run store {self.path} cannot be written: {error}",
            expected="a writable file on a disk with room",
            remedy=f"Make room (or free the file), then go on: {resume}. What was recorded is kept.",
        )

    # --- runs ---------------------------------------------------------------------------------------------

    def add_batch(self, batch: BatchRecord, runs: list[RunRecord]) -> None:
        """Record a batch and all its runs before the first one starts, so that none is lost in a crash."""
        columns = list(RunRecord.__dataclass_fields__)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    batch.id, batch.label, batch.graph, batch.fingerprint, batch.picture,
                    json.dumps(batch.options), batch.created_at, batch.shape,
                ),
            )  # fmt: skip
            db.executemany(_insert("runs", columns), [[getattr(run, c) for c in columns] for run in runs])

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
        with self._transaction() as db:
            db.execute(
                "UPDATE runs SET state = ?, output = ?, error = ?, score = ?, finished_at = ?, busy_s = busy_s + ? "
                "WHERE id = ?",
                (state, output, _writable(error), score, time.time(), busy_s, run_id),
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
        with self._transaction() as db:
            db.execute(
                "UPDATE runs SET state = 'running', error = NULL, started_at = coalesce(started_at, ?) WHERE id = ?",
                (time.time(), run_id),
            )
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
            return RunRecord(**dict(rows[0]))

    def runs(self, batch: str) -> list[RunRecord]:
        """All runs of a batch, in the order of their inputs."""
        rows = self.query("SELECT * FROM runs WHERE batch = ? ORDER BY rowid", batch)
        with self.decoding():
            return [RunRecord(**dict(row)) for row in rows]

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
        with self._transaction() as db:
            db.execute(
                "INSERT INTO steps VALUES (?,?,?,?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET state = excluded.state, "
                "output = excluded.output, content_key = excluded.content_key, error = excluded.error, "
                "tries = excluded.tries, started_at = excluded.started_at, finished_at = excluded.finished_at "
                "WHERE steps.state != 'done'",
                (
                    run_id, step.path, step.role, step.state, step.output, step.content_key,
                    _writable(step.error), step.tries, step.started_at, step.finished_at,
                ),
            )  # fmt: skip
            for ask in step.asks:
                db.execute(ASK_INSERT, _ask_values(run_id, step.path, ask))

    def finished_steps(self, run_id: str) -> dict[str, tuple[str | None, str]]:
        """Path → (output as JSON, content key) of every finished step of a run."""
        rows = self.query("SELECT path, output, content_key FROM steps WHERE run = ? AND state = 'done'", run_id)
        return {row["path"]: (row["output"], row["content_key"]) for row in rows}

    def next_attempts(self, run_id: str) -> dict[str, int]:
        """Path → first unused attempt number, for steps that a resumed run asks again."""
        rows = self.query("SELECT path, max(attempt) + 1 AS n FROM asks WHERE run = ? GROUP BY path", run_id)
        return {row["path"]: row["n"] for row in rows}

    def record_abandoned(self, ask: Ask, usage: Usage) -> None:
        """Keep what an ask has used that never got its reply, so that the roles' sums stay the engine's."""
        with self._transaction() as db:
            db.execute(
                _insert("abandoned", ["run", "path", "attempt", "role", "variant", *USAGE_COLUMNS]),
                [ask.run_id, ask.step_path, ask.attempt, ask.role, ask.variant]
                + [getattr(usage, column) for column in USAGE_COLUMNS],
            )

    # --- questions to people ------------------------------------------------------------------------------

    def ask_question(self, run_id: str, path: str, question: str) -> None:
        """Keep a question that a run waits for."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO questions (run, path, question) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (run_id, path, _writable(question)),
            )

    def questions(self, run_id: str) -> dict[str, tuple[str, str | None]]:
        """Path → (question, answer as JSON or None) of a run."""
        rows = self.query("SELECT path, question, answer FROM questions WHERE run = ?", run_id)
        return {row["path"]: (row["question"], row["answer"]) for row in rows}

    def answer_question(self, run_id: str, path: str, answer: str) -> None:
        """Keep a person's answer (JSON) for when the run is resumed."""
        with self._transaction() as db:
            db.execute("UPDATE questions SET answer = ? WHERE run = ? AND path = ?", (answer, run_id, path))

    # --- engines, traffic, reading --------------------------------------------------------------------------

    def record_engine_event(self, batch: str, kind: str, data: dict[str, Any]) -> None:
        """Keep what an engine did (adapter loaded, evicted, restarted) for the report."""
        with self._transaction() as db:
            db.execute("INSERT INTO engine_events VALUES (?, ?, ?, ?)", (time.time(), batch, kind, json.dumps(data)))

    def record_engine_totals(self, batch: str, engine: str, totals: dict[str, Any]) -> None:
        """Keep an engine's own totals (CPU-seconds, tokens, steps) beside what was charged to asks."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO engine_totals VALUES (?, ?, ?)", (batch, engine, json.dumps(totals)))

    def engine_totals(self, batch: str) -> dict[str, dict[str, Any]]:
        """Engine name → its totals of one batch."""
        rows = self.query("SELECT engine, data FROM engine_totals WHERE batch = ?", batch)
        with self.decoding():
            return {row["engine"]: json.loads(row["data"]) for row in rows}

    def record_energy(self, batch: str, energy: Energy) -> None:
        """Keep what the machine drew while a batch ran; a resumed batch has several such spans, which add up."""
        with self._transaction() as db:
            row = (batch, energy.seconds, energy.joules, json.dumps(energy.zones))
            db.execute("INSERT INTO energy VALUES (?, ?, ?, ?)", row)

    def query(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Read rows for a report; never used to write. Raises: StoreError when the file is damaged."""
        try:
            return self._db.execute(sql, values).fetchall()
        except UNREADABLE as error:
            raise self._damaged(str(error)) from error

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Where rows become records: what does not fit them is damage. Raises: StoreError."""
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(f"a record holds {error}") from error

    def _check_command(self) -> str:
        return shlex.join(("metier", "store", "check", self.path))

    def _damaged(self, how: str) -> StoreError:
        return StoreError(
            f"the run store {self.path} cannot be read: {how}",
            expected="the SQLite file as metier wrote it",
            remedy=f"See what is damaged with `{self._check_command()}`, "
            f"and save what can be read with `{shlex.join(('metier', 'store', 'recover', self.path))} --out NEW.db`.",
        )

    def traffic(self, batch: str | None = None) -> Iterator[TrafficRow]:
        """What the runs asked and were answered, with the score of their run."""
        where, values = ("AND runs.batch = ?", (batch,)) if batch else ("", ())
        rows = self._in_pieces(
            "SELECT asks.*, runs.score AS score, runs.input AS input FROM asks JOIN runs ON runs.id = asks.run "
            f"WHERE asks.error IS NULL {where} ORDER BY asks.asked_at, asks.rowid",
            *values,
        )
        for row in rows:
            with self.decoding():
                known = _traffic_row(row)
            yield known

    def _in_pieces(self, sql: str, *values: Any) -> Iterator[sqlite3.Row]:
        """As `query`, for what may be too much to hold at once."""
        try:
            yield from self._db.execute(sql, values)
        except UNREADABLE as error:
            raise self._damaged(str(error)) from error


def _traffic_row(row: sqlite3.Row) -> TrafficRow:
    return TrafficRow(
        role=row["role"],
        messages=tuple(Message.model_validate(m) for m in json.loads(row["messages"])),
        reply=row["reply"],
        thinking=None if row["thinking_profile"] is None else row["thinking"],
        score=row["score"],
        run_id=row["run"],
        step_path=row["path"],
        variant=row["variant"],
        prompt_layout=row["prompt_layout"],
        task=task_text_of_json(row["input"]),
    )


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
