"""The SQLite file of a run store: opened, brought up to date, written in transactions, its damage named."""

from __future__ import annotations

import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ...agents.errors import StoreError
from .commands import command
from .records import MIGRATIONS

__all__ = ["UNREADABLE", "StoreFile"]

OPENING_S, AGAIN_S = 10.0, 0.01
"""How long a store that others are just opening is asked for, and how often."""

UNREADABLE = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises on a damaged file: its own errors, or a message that quotes bytes which are no text."""


class StoreFile:
    """One SQLite file in write-ahead mode; `":memory:"` keeps it in memory.

    Raises StoreError when the file cannot be opened, was written by a newer version, or the disk is full.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
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
        with self.transaction() as db:
            # Read once more: another process may have brought it up to date while this one waited.
            version = db.execute("PRAGMA user_version").fetchone()[0]
            for statement in "".join(MIGRATIONS[version:]).split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {max(version, len(MIGRATIONS))}")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write all that the block writes, or nothing of it. Raises: StoreError when the file cannot take it."""
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

    def query_in_pieces(self, sql: str, *values: Any) -> Iterator[sqlite3.Row]:
        """As `query`, for what may be too much to hold at once."""
        try:
            yield from self._db.execute(sql, values)
        except UNREADABLE as error:
            raise self._damaged(str(error)) from error
