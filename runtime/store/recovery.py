"""What is damaged in a run store, and what of it can still be read: never changes the file it looks at."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from ...agents.errors import StoreError
from .reading import copied_store
from .store import RunStore
from .store_file import UNREADABLE

__all__ = ["check_store", "recover_store"]

FINDINGS_LIMIT = 100
"""Findings of SQLite's check that are listed."""

RECOVERY_TIMEOUT_S = 3600.0
"""Seconds that the `sqlite3` program has for its own recovery."""

# Tables in the order in which rows refer to each other.
_TABLES = (
    "batches", "runs", "steps", "asks", "abandoned", "questions", "engine_events", "engine_totals", "energy",
    "responses",
)  # fmt: skip
_LAST_ROW = (1 << 63) - 1


def check_store(path: Path) -> list[str]:
    """What SQLite's integrity check finds, and records that do not read back; nothing when the store is whole.

    Raises: StoreError when there is no such file.
    """
    with copied_store(path) as copy:
        found = _integrity(copy)
        if found:
            return found
        try:
            with RunStore(copy) as store:
                for batch in store.batches():
                    for run in store.runs(batch.id):
                        store.finished_steps(run.id)
                for _ in store.traffic():
                    pass
        except StoreError as error:
            return [error.problem.replace(str(copy), str(path))]
    return []


def recover_store(path: Path, out: Path) -> dict[str, int]:
    """Write a new store `out` with every row that can be read, and return how many those are by table.

    With the `sqlite3` program on PATH its `.recover` comes first, which finds rows of pages that no table leads to.
    Raises: StoreError when `path` is missing, or `out` is there already or cannot be written.
    """
    if out.exists():
        raise StoreError(f"{out} is there already", expected="the name of a new file")
    with copied_store(path) as copy:
        with RunStore(out):  # its schema; and where it cannot be written, that is known now
            pass
        source = _recovered_by_sqlite(copy) or copy
        counts = {}
        try:
            with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(out)) as new:
                new.execute("PRAGMA foreign_keys = OFF")
                for table in _TABLES:
                    counts[table] = _copy_rows(old, new, table)
                    new.commit()
        except sqlite3.OperationalError as error:  # what cannot be read is passed over inside
            raise StoreError(
                f"{out} cannot be written: {error}",
                expected="a new file on a disk with room",
                remedy="Free space there, remove the file, and recover again.",
            ) from error
    return counts


def _integrity(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        try:
            rows = db.execute(f"PRAGMA integrity_check({FINDINGS_LIMIT})").fetchall()
        except UNREADABLE as error:
            return [str(error)]
    return [text for (text,) in rows if text != "ok"]


def _recovered_by_sqlite(path: Path) -> Path | None:
    program = shutil.which("sqlite3")
    if program is None:
        return None
    found = path.with_name("recovered.db")
    try:
        script = subprocess.run(
            [program, str(path), ".recover"], capture_output=True, check=False, timeout=RECOVERY_TIMEOUT_S
        )
        if script.returncode or not script.stdout:
            return None
        done = subprocess.run(
            [program, str(found)], input=script.stdout, capture_output=True, check=False, timeout=RECOVERY_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found if done.returncode == 0 and found.is_file() else None


def _copy_rows(old: sqlite3.Connection, new: sqlite3.Connection, table: str) -> int:
    wanted = [row[1] for row in new.execute(f"PRAGMA table_info({table})")]
    try:
        there = {row[1] for row in old.execute(f"PRAGMA table_info({table})")}
    except UNREADABLE:
        return 0
    columns = [name for name in wanted if name in there]  # an older store has fewer, with defaults in the new one
    if not columns:
        return 0
    insert = f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    copied = 0
    for row in _readable_rows(old, table, columns):
        try:
            copied += new.execute(insert, row).rowcount
        except sqlite3.IntegrityError:
            continue  # a column that must hold something was lost
    return copied


def _readable_rows(db: sqlite3.Connection, table: str, columns: list[str]) -> Iterator[tuple[object, ...]]:
    """The rows of a table that can be read; from a damaged place on, those behind it."""
    names = ", ".join(columns)
    if not _has_rowid(db, table):
        try:
            yield from db.execute(f"SELECT {names} FROM {table}")
        except UNREADABLE:
            return
        return
    last = -1
    while True:
        try:
            for number, *row in db.execute(
                f"SELECT rowid, {names} FROM {table} WHERE rowid > ? ORDER BY rowid", (last,)
            ):
                last = number
                yield tuple(row)
            return
        except UNREADABLE:
            behind = _next_readable(db, table, names, last)
            if behind is None:
                return
            last = behind


def _next_readable(db: sqlite3.Connection, table: str, names: str, last: int) -> int | None:
    """The smallest row number found behind which a row can be read again, None when there is none."""
    step = 1
    while last + step < _LAST_ROW:
        try:
            row = db.execute(f"SELECT {names} FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT 1", (last + step,))
            return last + step if row.fetchone() else None
        except UNREADABLE:
            step *= 2
    return None


def _has_rowid(db: sqlite3.Connection, table: str) -> bool:
    try:
        db.execute(f"SELECT rowid FROM {table} LIMIT 0")
    except UNREADABLE:
        return False
    return True
