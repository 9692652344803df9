"""A resumed run, or a later try of a step, repeats no recorded call, and asks about those it must not repeat."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from metier.agents import AnswerError, Ask, ResumeError, Role, RunInterrupted, ScriptedBackend, TaskGraph, tool
from metier.runtime import RunStore, Session, open_session
from tests.agents.workflow import Answer, Puzzle
from tests.runtime.runs.test_resuming import PowerCut
from tests.runtime.runs.test_tools import calls, graph_of, solve, told

pytestmark = pytest.mark.anyio


class Counted:
    """Tools that count their calls, and end the process in the n-th."""

    def __init__(self, die_at: int) -> None:
        self.done: list[str] = []
        self.begun = 0
        self._die_at = die_at

    async def send(self, text: str) -> str:
        """Sends."""
        self.begun += 1
        if self.begun == self._die_at:
            raise PowerCut
        self.done.append(text)
        return f"sent {text}"


async def die(session: Session, graph: TaskGraph) -> str:
    with pytest.raises(PowerCut):
        await session.run(graph, Puzzle(text="x"))
    assert session.batch is not None
    return session.store.runs(session.batch)[0].id


def in_three_turns(ask: Ask) -> Any:
    turn = sum(message.role == "assistant" for message in ask.messages)
    return Answer(value=3) if turn == 3 else calls(("send", {"text": f"{turn}"}))


@pytest.mark.parametrize("die_at", [1, 2, 3])
async def test_a_resumed_run_repeats_no_call_that_is_recorded(die_at: int) -> None:
    backend, counted = ScriptedBackend({"solver": in_three_turns}), Counted(die_at)
    with RunStore(":memory:") as store:
        async with open_session(backend=backend, store=store) as session:
            graph = graph_of(counted.send)
            run = await die(session, graph)
            asked = len(backend.asks)
            assert await session.resume(graph, run) == Answer(value=3)
            assert counted.done == ["0", "1", "2"]
            assert asked == die_at and len(backend.asks) == 4, "no reply that led to a call is asked for again"
            assert store.query("SELECT count(*) AS n FROM asks")[0]["n"] == 4


async def test_a_reply_with_several_calls_goes_on_with_those_that_are_open() -> None:
    counted = Counted(die_at=2)
    first = calls(*(("send", {"text": text}) for text in "abc"))
    backend = ScriptedBackend({"solver": [first, Answer(value=1)]})
    async with open_session(backend=backend, store=":memory:") as session:
        graph = graph_of(counted.send)
        run = await die(session, graph)
        await session.resume(graph, run)
    assert sorted(counted.done) == ["a", "b", "c"], "each was done once"
    assert told(backend) == "Results:\n1. send: sent a\n2. send: sent b\n3. send: sent c"


@pytest.mark.parametrize(
    "answer, done, result",
    [
        ({"result": "sent b"}, ["a"], "sent b"),
        ({"call_again": True}, ["a", "b"], "sent b"),
        ({}, ["a"], "done"),
    ],
)
async def test_a_call_that_must_not_be_repeated_is_asked_about(answer: Any, done: list[str], result: str) -> None:
    counted = Counted(die_at=2)
    backend = ScriptedBackend(
        {"solver": [calls(("send", {"text": "a"})), calls(("send", {"text": "b"})), Answer(value=1)]}
    )
    async with open_session(backend=backend, store=":memory:") as session:
        graph = graph_of(tool(counted.send, repeat=False))
        run = await die(session, graph)
        with pytest.raises(RunInterrupted, match='\'send\' was called with {"text": "b"}') as waits:
            await session.resume(graph, run)
        assert list(waits.value.questions) == ["solver/tool[2]"] and counted.done == ["a"]
        with pytest.raises(ResumeError, match="does not fit"):
            await session.resume(graph, run, answers={"solver/tool[2]": {"call_again": "perhaps"}})
        assert await session.resume(graph, run, answers={"solver/tool[2]": answer}) == Answer(value=1)
    assert counted.done == done and told(backend).endswith(f"1. send: {result}")


async def test_it_is_asked_about_again_when_the_second_call_dies_too() -> None:
    counted = Counted(die_at=1)
    backend = ScriptedBackend({"solver": [calls(("send", {"text": "a"})), Answer(value=1)]})
    async with open_session(backend=backend, store=":memory:") as session:
        graph = graph_of(tool(counted.send, repeat=False))
        run = await die(session, graph)
        with pytest.raises(RunInterrupted):
            await session.resume(graph, run)
        counted._die_at = 2
        with pytest.raises(PowerCut):
            await session.resume(graph, run, answers={"solver/tool[1]": {"call_again": True}})
        with pytest.raises(RunInterrupted):
            await session.resume(graph, run)
        assert counted.begun == 2 and counted.done == []


async def test_a_step_that_times_out_asks_before_it_repeats_such_a_call() -> None:
    begun = []

    async def hang() -> str:
        begun.append(1)
        await anyio.sleep_forever()
        return ""

    graph = TaskGraph("solve", takes=Puzzle, gives=Answer)
    role = Role("solver", takes=Puzzle, gives=Answer, tools=[tool(hang, repeat=False)])
    graph.step(role, timeout_s=0.05, retries=3)
    with pytest.raises(RunInterrupted, match="Was it done"):
        await solve(ScriptedBackend(default=lambda ask: calls(("hang", {}))), graph)
    assert begun == [1]


async def test_a_later_try_of_a_step_goes_on_from_the_last_results() -> None:
    counted = Counted(die_at=0)
    backend = ScriptedBackend({"solver": [calls(("send", {"text": "a"})), "no", "no", Answer(value=1)]})
    assert await solve(backend, graph_of(counted.send)) == Answer(value=1)
    assert counted.done == ["a"]


async def test_a_failed_run_goes_on_behind_its_calls() -> None:
    counted = Counted(die_at=0)
    backend = ScriptedBackend({"solver": [calls(("send", {"text": "a"})), "no", "no", Answer(value=1)]})
    async with open_session(backend=backend, store=":memory:") as session:
        graph = graph_of(counted.send, retries=0)
        with pytest.raises(AnswerError):
            await session.run(graph, Puzzle(text="x"))
        assert session.batch is not None
        run = session.store.runs(session.batch)[0].id
        assert await session.resume(graph, run) == Answer(value=1)
    assert counted.done == ["a"] and told(backend) == "Results:\n1. send: sent a"
