"""The run store keeps what it said it kept; settings fail by name."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from metier.agents import Message, ResumeError, ScriptedBackend, SettingsError, StoreError, TaskGraph
from metier.runtime import RunStore, load_settings, open_session
from metier.runtime.store.records import MIGRATIONS, AskRecord, BatchRecord, RunRecord, StepRecord
from tests.agents.workflow import Plan, Puzzle, planner


def a_batch(store: RunStore, runs: int = 1) -> None:
    records = [RunRecord(f"b.{i}", "b", str(i), "{}", 0) for i in range(runs)]
    store.add_batch(BatchRecord("b", "label", "g", "f", "flowchart", {"seed": 1}, 1.0), records)


def a_step(path: str = "solver", state: str = "done", output: str = "1") -> StepRecord:
    ask = AskRecord(0, "solver", None, "why", 1, (Message(role="user", content="x"),), 1.0, 2.0, reply=output)
    return StepRecord(path, "solver", state, output, "key", 1.0, 2.0, asks=[ask])  # type: ignore[arg-type]


def test_what_is_recorded_comes_back(tmp_path: Path) -> None:
    with RunStore(tmp_path / "deep" / "runs.db") as store:
        a_batch(store)
        store.record_step("b.0", a_step())
        store.end_run("b.0", "finished", output="1", busy_s=1.0)
    with RunStore(tmp_path / "deep" / "runs.db") as store:
        assert store.finished_steps("b.0") == {"solver": ("1", "key")}
        assert store.run("b.0").state == "finished"
        assert store.batch("b").options == {"seed": 1}
        assert store.next_attempts("b.0") == {"solver": 1}


def test_a_finished_step_is_never_overwritten() -> None:
    with RunStore(":memory:") as store:
        a_batch(store)
        store.record_step("b.0", a_step(output="1"))
        second = a_step(output="2")
        second.asks[0].attempt = 1
        store.record_step("b.0", second)
        assert store.finished_steps("b.0") == {"solver": ("1", "key")}


def test_failed_steps_are_forgotten_when_a_run_goes_on() -> None:
    with RunStore(":memory:") as store:
        a_batch(store)
        store.record_step("b.0", a_step(state="failed"))
        store.start_run("b.0")
        assert store.query("SELECT count(*) AS n FROM steps")[0]["n"] == 0


def test_a_step_and_its_asks_are_one_transaction() -> None:
    with RunStore(":memory:") as store:
        a_batch(store)
        step = a_step()
        step.asks.append(step.asks[0])  # the same attempt twice breaks the second insert
        with pytest.raises(StoreError, match="refuses a row"):
            store.record_step("b.0", step)
        assert store.finished_steps("b.0") == {}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be opened.*Name another file with --store"):
        RunStore(tmp_path / "file" / "runs.db")


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs.db").write_text("no database" * 1000)
    with pytest.raises(StoreError, match="file is not a database"):
        RunStore(tmp_path / "runs.db")


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "runs.db")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(StoreError, match=f"schema {len(MIGRATIONS) + 1}; expected at most {len(MIGRATIONS)}"):
        RunStore(tmp_path / "runs.db")


@pytest.mark.anyio
async def test_a_full_disk_loses_nothing_and_the_run_goes_on_later(tmp_path: Path) -> None:
    """The disk fills up while a run is recorded: a named error, and resume finishes it once there is room."""
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner)
    long = "x" * 200_000
    backend = ScriptedBackend({"planner": lambda ask: Plan(expression=long)})
    with RunStore(tmp_path / "runs.db") as store:
        async with open_session(backend=backend, store=store) as session:
            pages = store.query("PRAGMA page_count")[0][0]
            store.query(f"PRAGMA max_page_count = {pages + 10}")
            with pytest.raises(StoreError, match="database or disk is full.*metier resume"):
                await session.run(graph, Puzzle(text="x"))
            assert session.batch is not None
            run = store.runs(session.batch)[0]
            assert store.finished_steps(run.id) == {}
            store.query("PRAGMA max_page_count = 1000000")
            assert (await session.resume(graph, run.id)).expression == long


def test_unknown_runs_and_batches_are_named() -> None:
    with RunStore(":memory:") as store:
        a_batch(store)
        with pytest.raises(ResumeError, match="no run 'x' in :memory:; expected one of b.0"):
            store.run("x")
        with pytest.raises(ResumeError, match="no batch 'x' in :memory:; expected one of b"):
            store.batch("x")


def test_settings_come_from_file_then_environment_then_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.yaml").write_text("concurrency: 2\nengine: {kv_cache_mib: 100, max_running: 3, threads: 1}\n")
    monkeypatch.setenv("METIER_ENGINE__KV_CACHE_MIB", "200")
    monkeypatch.setenv("METIER_ENGINE__MAX_RUNNING", "4")
    settings = load_settings(tmp_path / "s.yaml", {"engine.kv_cache_mib": 300})
    assert (settings.concurrency, settings.engine.threads) == (2, 1)
    assert (settings.engine.kv_cache_mib, settings.engine.max_running) == (300, 4)


def test_unknown_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="unknown setting 'engine.kv_cache_mb'.*Did you mean 'engine.kv_cache_mib'"):
        load_settings(None, {"engine.kv_cache_mb": 1})
    with pytest.raises(SettingsError, match="unknown setting 'kv_cache'.*Did you mean 'engine.kv_cache_mib'"):
        load_settings(None, {"kv_cache": 1})
    with pytest.raises(SettingsError, match="expected one of kv_cache_mib.*docs/settings.md"):
        load_settings(None, {"engine.colour": 1})
    with pytest.raises(SettingsError, match="setting concurrency=0: .*greater than or equal to 1"):
        load_settings(None, {"concurrency": 0})
    (tmp_path / "s.yaml").write_text("concurency: 2")
    with pytest.raises(SettingsError, match="Did you mean 'concurrency'"):
        load_settings(tmp_path / "s.yaml")
    monkeypatch.setenv("METIER_CONCURENCY", "2")
    with pytest.raises(SettingsError, match="unknown setting 'concurency'"):
        load_settings()
    monkeypatch.delenv("METIER_CONCURENCY")
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path / "missing.yaml")


def test_switches_that_are_no_settings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch in ("METIER_PLUGIN", "METIER_LORA_KERNEL", "METIER_FIER_KERNEL"):
        monkeypatch.setenv(switch, "0")
    assert load_settings() is not None
