"""Runs that were stopped go on from what is recorded, or say why they cannot."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from metier.agents import Ask, LimitError, ResumeError, RunInterrupted, ScriptedBackend, TaskGraph
from metier.runtime import RunLimits, RunStore, Session, open_session
from metier.runtime.settings.session import load_settings
from tests.agents.workflow import Answer, Plan, Puzzle, Verdict, planner, second_time_right, solve_and_check, solver

pytestmark = pytest.mark.anyio


class PowerCut(BaseException):
    """Ends the process, and is no error of a run."""


@pytest.fixture
def store() -> Iterator[RunStore]:
    with RunStore(":memory:") as store:
        yield store


async def test_limits_stop_a_run_cleanly(store: RunStore) -> None:
    never = ScriptedBackend(
        {"planner": lambda a: Plan(expression="1"), "solver": lambda a: Answer(value=1)},
        default=lambda a: Verdict(correct=False),
    )
    graph = solve_and_check(max_rounds=100)[0]
    async with open_session(backend=never, store=store) as session:
        with pytest.raises(LimitError, match="expected at most max_tokens=100"):
            await session.run(graph, Puzzle(text="x"), limits=RunLimits(max_tokens=100))
        assert session.batch is not None
        run = store.runs(session.batch)[0]
        assert run.state == "stopped"
        steps = len(store.finished_steps(run.id))
        asked = len(never.asks)
        assert await session.resume(graph, run.id) == Answer(value=1)
        assert len(never.asks) == asked + 300 - steps

    async def forever(ask: Ask) -> str:
        await anyio.sleep_forever()
        raise AssertionError

    async with open_session(backend=ScriptedBackend(default=forever), store=store) as session:
        with pytest.raises(LimitError, match="longer than max_seconds_s=0.01"):
            await session.run(graph, Puzzle(text="x"), limits=RunLimits(max_seconds_s=0.01))


@pytest.mark.parametrize(
    ("given", "stops"),
    [(None, True), (RunLimits(), True), (RunLimits(max_seconds_s=60.0), True), (RunLimits(max_tokens=10**6), False)],
)
async def test_what_limits_leave_open_the_settings_say(store: RunStore, given: RunLimits | None, stops: bool) -> None:
    graph, settings = solve_and_check()[0], load_settings(overrides={"limits.max_tokens": 1})
    async with open_session(backend=second_time_right(), store=store, settings=settings) as session:
        (result,) = await session.map(graph, [Puzzle(text="x")], limits=given)
        assert isinstance(result.error, LimitError) == stops


async def test_recorded_steps_never_run_twice(store: RunStore) -> None:
    """A run that died in step 3 goes on there."""
    died = False

    def critic_dies(ask: Ask) -> Verdict:
        nonlocal died
        if not died:
            died = True
            raise PowerCut
        return Verdict(correct=True)

    backend = ScriptedBackend({"planner": [Plan(expression="1")], "solver": [Answer(value=1)], "critic": critic_dies})
    graph = solve_and_check()[0]
    async with open_session(backend=backend, store=store) as session:
        with pytest.raises(PowerCut):
            await session.run(graph, Puzzle(text="x"))
        assert session.batch is not None
        run = store.runs(session.batch)[0]
        assert run.state == "running"
    async with open_session(backend=backend, store=store) as session:
        assert await session.resume(graph, run.id) == Answer(value=1)


async def test_what_cannot_be_resumed_is_said(store: RunStore) -> None:
    graph = solve_and_check()[0]
    async with open_session(backend=second_time_right(), store=store) as session:
        await session.run(graph, Puzzle(text="x"))
        assert session.batch is not None
        with pytest.raises(ResumeError, match="is finished"):
            await session.resume(graph, store.runs(session.batch)[0].id)
        with pytest.raises(ResumeError, match="no run 'nope' in :memory:; expected one of solve-and-check"):
            await session.resume(graph, "nope")
        stopped = await _stopped(session, graph)
        with pytest.raises(ResumeError, match="was started with workflow"):
            await session.resume(solve_and_check(max_rounds=7)[0], stopped)


async def _stopped(session: Session, graph: TaskGraph) -> str:
    with pytest.raises(LimitError):
        await session.run(graph, Puzzle(text="x"), limits=RunLimits(max_tokens=1))
    assert session.batch is not None
    return session.store.runs(session.batch)[0].id


async def test_a_person_answers_and_the_run_goes_on(store: RunStore) -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    plan = graph.step(planner)
    ok = graph.ask_person("approve", takes=Plan, gives=Verdict, question="Is {{ plan.expression }} right?", after=plan)
    graph.step(solver, after=ok)
    backend = ScriptedBackend({"planner": [Plan(expression="1+1")], "solver": [Answer(value=2)]})
    async with open_session(backend=backend, store=store) as session:
        with pytest.raises(RunInterrupted) as waits:
            await session.run(graph, Puzzle(text="x"))
        assert waits.value.questions == {"approve": "Is 1+1 right?"}
        assert session.batch is not None
        run = store.runs(session.batch)[0]
        assert run.state == "interrupted"
    async with open_session(backend=backend, store=store) as session:
        with pytest.raises(ResumeError, match="no question at 'approv'"):
            await session.resume(graph, run.id, answers={"approv": True})
        assert await session.resume(graph, run.id, answers={"approve": {"correct": True}}) == Answer(value=2)
