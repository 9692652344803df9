"""A run store as version 0.1.0 wrote it: read, reported, checked, and its runs gone on with.

`store_0_1_0.db` was written by that version (commit 299a247) with `tests/workflow_for_cli.py`: a batch of four runs
that finished, one of six that was killed (-9) at its eighth ask, and a run that waits for a person.
"""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from metier.runtime import RunStore
from metier.runtime.report.ledger import read_ledger
from metier.runtime.store.records import MIGRATIONS
from metier.runtime.store.recovery import check_store, recover_store
from tests import workflow_for_cli
from tests.runtime.cli.test_cli import metier

WRITTEN = Path(__file__).with_name("store_0_1_0.db")
WHOLE, KILLED, WAITS = range(3)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The store in a folder that can be written; its batches name the workflow file where it is here."""
    path = shutil.copy(WRITTEN, tmp_path / "runs.db")
    with sqlite3.connect(path) as db:
        db.execute(
            "UPDATE batches SET options = json_set(options, '$.workflow', replace("
            "json_extract(options, '$.workflow'), 'workflow_for_cli.py', ?))",
            [workflow_for_cli.__file__],
        )
    return path


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as db:
        return db.execute(sql).fetchall()


def test_the_fixture_is_of_that_version() -> None:
    with sqlite3.connect(f"file:{WRITTEN}?immutable=1", uri=True) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
    assert 0 < version <= len(MIGRATIONS)


def test_it_is_whole_and_can_be_read_and_reported(old: Path) -> None:
    assert check_store(old) == []
    with RunStore(old) as store:
        batches = store.batches()
        assert [len(store.runs(batch.id)) for batch in batches] == [4, 6, 1]
        assert all(run.state == "finished" and run.busy_s > 0 for run in store.runs(batches[WHOLE].id))
        ledgers = [read_ledger(store, batch.id) for batch in batches]
    assert [len(ledger.asks) for ledger in ledgers] == [8, 6, 1] and ledgers[WAITS].questions == 1
    ids = [batch.id for batch in batches]
    shown = metier("report", *ids[:2], "--store", old.name, "--markdown", "report.md", cwd=old.parent)
    assert shown.returncode == 0, shown.stderr
    assert (old.parent / "report.md").read_text().startswith("# ")


def test_a_run_that_was_killed_goes_on_and_nothing_is_asked_twice(old: Path) -> None:
    done = "SELECT run, path, output, finished_at FROM steps WHERE state = 'done'"
    before = set(rows(old, done))
    with RunStore(old) as store:
        batch = store.batches()[KILLED].id
    resumed = metier("resume", batch, "--store", old.name, "--export-traffic", "asks.jsonl", cwd=old.parent)
    assert resumed.returncode == 0, resumed.stderr
    assert "5 of 6" in resumed.stdout and before <= set(rows(old, done))
    with RunStore(old) as store:
        assert {run.state for run in store.runs(batch)} == {"finished"}
        answered = store.query("SELECT count(*) AS n FROM asks WHERE error IS NULL GROUP BY run, path")
    assert {row["n"] for row in answered} == {1}
    assert len((old.parent / "asks.jsonl").read_text().splitlines()) == 12


def test_a_question_to_a_person_is_answered(old: Path) -> None:
    with RunStore(old) as store:
        run = store.runs(store.batches()[WAITS].id)[0].id
    answered = metier("resume", run, "--answer", '{"ok": true}', "--store", old.name, cwd=old.parent)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout == '{"value":7}\n'


def test_it_can_be_recovered_into_a_store_of_today(old: Path) -> None:
    recover_store(old, old.with_name("new.db"))
    with RunStore(old.with_name("new.db")) as store:
        assert [len(store.runs(batch.id)) for batch in store.batches()] == [4, 6, 1]
