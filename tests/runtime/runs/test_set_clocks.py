"""The wall clock may be set in the middle of a batch, or between a batch and its resume: no duration changes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from metier.agents import Ask, ScriptedBackend, Task
from metier.agents.messages import Message, Usage
from metier.runtime import RunStore, open_session
from metier.runtime.bench.load import LoadLevel, apply_load
from metier.runtime.bench.records import RequestRecord
from metier.runtime.bench.summary import level_figures
from metier.runtime.bench.workload import SyntheticMix, synthetic
from metier.runtime.events import Event
from metier.runtime.meters import stamps
from metier.runtime.report import render_html, render_report
from metier.runtime.report.costs import workflow_figures
from metier.runtime.report.ledger import read_ledger
from metier.runtime.runs.batches import new_batch
from metier.runtime.server.run_protocol import run_row, run_steps
from metier.runtime.store.records import AskRecord, StepRecord
from tests.agents.workflow import Answer, Plan, Puzzle, Verdict, solve_and_check

HOUR_S = 3600.0
RUNS, ROUNDS, ROLES = 4, 2, 3


class WallClock:
    """The wall clock of this process, which anybody may set back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._right = time.time
        self.jumps = 0

    def jump(self) -> None:
        """Set it back by an hour."""
        self.jumps += 1
        self._monkeypatch.setattr(time, "time", lambda: self._right() - self.jumps * HOUR_S)


def solves_in_the_second_round(clock: WallClock) -> ScriptedBackend:
    """Sets the clock back whenever the solver is asked."""

    def solve(ask: Ask) -> Answer:
        clock.jump()
        return Answer(value=3)

    plan, judge = Plan(expression="1+2"), lambda ask: Verdict(correct=ask.round > 1)
    return ScriptedBackend({"planner": lambda ask: plan, "solver": solve, "critic": judge})


@pytest.mark.anyio
async def test_a_clock_that_jumps_back_in_the_middle_of_a_batch_changes_no_duration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, events = WallClock(monkeypatch), list[Event]()
    with RunStore(":memory:") as store:
        began_s = time.monotonic()
        async with open_session(
            backend=solves_in_the_second_round(clock), store=store, on_event=events.append
        ) as session:
            await session.map(solve_and_check()[0], [Puzzle(text=str(n)) for n in range(RUNS)], concurrency=2)
            assert session.batch is not None
            wall_s = workflow_figures(read_ledger(store, session.batch)).wall_s
        took_s = time.monotonic() - began_s
        spans = store.query(
            "SELECT finished_at - started_at AS s FROM runs UNION ALL SELECT finished_at - started_at FROM steps "
            "UNION ALL SELECT answered_at - asked_at FROM asks"
        )
    assert clock.jumps == RUNS * ROUNDS
    told = [event.data["seconds"] for event in events if "seconds" in event.data]
    assert len(told) == 2 * RUNS * ROUNDS * ROLES and len(spans) == RUNS + len(told)
    assert all(0 <= seconds <= took_s for seconds in (wall_s, *told, *(row["s"] for row in spans)))


@pytest.mark.anyio
async def test_a_benchmarks_rates_do_not_follow_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, records = WallClock(monkeypatch), list[RequestRecord]()

    def answer(ask: Ask) -> str:
        clock.jump()
        return "yes"

    began_s = time.monotonic()
    mix = synthetic(SyntheticMix(requests=6))
    await apply_load(ScriptedBackend(default=answer), mix, LoadLevel(concurrency=2), records.append)
    took_s = time.monotonic() - began_s
    assert clock.jumps == len(records) == 6
    assert level_figures(records)["requests_per_s"] >= len(records) / took_s


@pytest.mark.anyio
@pytest.mark.parametrize("back_s", [HOUR_S, -HOUR_S])
async def test_a_run_resumed_under_a_clock_that_was_set_took_no_negative_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, back_s: float
) -> None:
    def fails(ask: Ask) -> Any:
        raise ValueError("not in the first process")

    graph, clock = solve_and_check()[0], WallClock(monkeypatch)
    with RunStore(tmp_path / "runs.db") as store:
        async with open_session(backend=ScriptedBackend(default=fails), store=store) as session:
            (failed,) = await session.map(graph, [Puzzle(text="x")])
        # What another process would have read when it began.
        monkeypatch.setattr(stamps, "_WALL_AT_ZERO_S", stamps.stamp_s() - time.monotonic() - back_s)
        async with open_session(backend=solves_in_the_second_round(clock), store=store) as session:
            assert await session.resume(graph, failed.run_id) == Answer(value=3)
        (batch,) = store.batches()
        shown, ledger = run_row(store.run(failed.run_id), live=False), read_ledger(store, batch.id)
    assert shown["finished_at"] - shown["started_at"] == pytest.approx(max(-back_s, 0.0), abs=HOUR_S / 2)
    assert workflow_figures(ledger).wall_s == pytest.approx(max(-back_s, 0.0), abs=HOUR_S / 2)


def test_spans_of_older_stores_that_end_before_they_begin_are_read_as_no_time(tmp_path: Path) -> None:
    """Version 0.1.0 read the wall clock for each stamp."""
    graph, prompt = solve_and_check()[0].build(), (Message(role="user", content="x"),)
    batch, (run,), _ = new_batch(graph, [Task("0", Puzzle(text="x"))], 0, "old", {})
    with RunStore(tmp_path / "runs.db") as store:
        store.add_batch(batch, [run])
        store.start_run(run.id)
        for role in ("planner", "solver", "critic"):
            ask = AskRecord(
                0, role, None, "", 1, prompt, 9e9 + HOUR_S, 9e9, "{}", finish_reason="stop", engine="base",
                usage=Usage(queue_s=1.0, prefill_s=1.0, decode_s=1.0),
            )  # fmt: skip
            path = f"attempt[1]/{role}"
            store.record_step(run.id, StepRecord(path, role, "done", "{}", "k", 9e9 + HOUR_S, 9e9, asks=[ask]))
        store.end_run(run.id, "finished", output="{}")
        ledger = read_ledger(store, batch.id)
        assert all(step.finished_at == step.started_at for step in ledger.steps)
        assert all(ask.answered_at == ask.asked_at for ask in ledger.asks)
        assert all(row["finished_at"] == row["started_at"] for row in run_steps(store, run.id)["steps"])
        assert render_report(store, [batch.id]) and render_html(store, [batch.id])
