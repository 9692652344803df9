"""Stores with flipped bits: a named error that says what to do, what is damaged, and what can be saved."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from metier.agents import MetierError, StoreError
from metier.runtime import RunStore, render_report
from metier.runtime.store.records import AskRecord, BatchRecord, RunRecord, StepRecord
from metier.runtime.store.recovery import check_store, recover_store

RUNS, STEPS, DAMAGED = 40, 3, 120


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "runs.db"
    with RunStore(path) as store:
        records = [RunRecord(f"b.{i}", "b", str(i), '{"text": "x"}', 0) for i in range(RUNS)]
        store.add_batch(BatchRecord("b", "label", "g", "f", "flowchart", {"seed": 1}, 1.0), records)
        for run in records:
            store.start_run(run.id)
            for number in range(STEPS):
                ask = AskRecord(0, "solver", None, "why", 1, (), 1.0, 2.0, reply=f"reply {number} " * 20)
                step = StepRecord(f"step{number}", "solver", "done", "1", "key", 1.0, 2.0, asks=[ask])
                store.record_step(run.id, step)
            store.end_run(run.id, "finished", output="1", score=1.0, busy_s=1.0)
        store.record_engine_totals("b", "engine", {"cpu_s": 1.0})
    return path


def damaged(whole: Path, folder: Path, seed: int) -> Path:
    """A copy with a run of bytes overwritten somewhere behind the first page."""
    rng = random.Random(seed)
    content = bytearray(whole.read_bytes())
    start = rng.randrange(4096 if seed % 4 else 100, len(content))
    for at in range(start, min(start + rng.choice((1, 8, 200, 4096)), len(content))):
        content[at] ^= rng.randrange(1, 256)
    path = folder / f"damaged-{seed}.db"
    path.write_bytes(content)
    return path


def read_all(path: Path) -> None:
    with RunStore(path) as store:
        for batch in store.batches():
            render_report(store, batch.id)
            for run in store.runs(batch.id):
                store.run(run.id)
                store.finished_steps(run.id)
                store.next_attempts(run.id)
                store.questions(run.id)
        list(store.traffic())


def test_a_whole_store_has_no_findings_and_is_recovered_whole(whole: Path, tmp_path: Path) -> None:
    assert check_store(whole) == []
    counts = recover_store(whole, tmp_path / "new.db")
    assert (counts["runs"], counts["steps"], counts["asks"]) == (RUNS, RUNS * STEPS, RUNS * STEPS)
    with RunStore(tmp_path / "new.db") as new, RunStore(whole) as old:
        assert new.runs("b") == old.runs("b")
        assert list(new.traffic()) == list(old.traffic())
        assert render_report(new, "b") == render_report(old, "b")


@pytest.mark.parametrize("program", ["sqlite3", "none"])
def test_damage_is_named_and_what_can_be_read_is_saved(
    whole: Path, tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if program == "none":
        monkeypatch.setenv("PATH", "")
    elif shutil.which(program) is None:
        pytest.skip("the sqlite3 program is not on PATH")
    named, saved = 0, []
    for seed in range(DAMAGED):
        path = damaged(whole, tmp_path, seed)
        before = path.read_bytes()
        try:
            read_all(path)
        except StoreError as error:
            named += 1
            assert "store" in error.remedy
        except MetierError:
            named += 1
        before = path.read_bytes()
        check_store(path)
        try:
            counts = recover_store(path, tmp_path / f"new-{seed}.db")
            read_all(tmp_path / f"new-{seed}.db")
            saved.append(counts["asks"])
        except StoreError:
            saved.append(0)
        assert path.read_bytes() == before  # looking changes nothing
    assert named > DAMAGED // 10
    assert sorted(saved)[DAMAGED // 2] > 0.9 * RUNS * STEPS


def test_a_file_that_is_there_is_not_overwritten(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is there already"):
        recover_store(whole, whole)
    with pytest.raises(StoreError, match="there is no run store"):
        check_store(tmp_path / "none.db")
