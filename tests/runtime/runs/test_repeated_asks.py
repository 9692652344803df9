"""A greedy ask whose reply did not parse is not asked again as it was: the same model would say the same."""

from __future__ import annotations

import pytest

from metier.agents import AnswerError, Ask, EngineDeadError, Role, ScriptedBackend, TaskGraph
from metier.router import Assignment, RoleAssignment
from metier.runtime import open_session
from tests.agents.workflow import Answer, Puzzle

pytestmark = pytest.mark.anyio


def one_step(**more: object) -> TaskGraph:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(Role("solver", takes=Puzzle, gives=Answer, **more), retries=2)  # type: ignore[arg-type]
    return graph


async def asks_of(backend: ScriptedBackend, graph: TaskGraph, assignment: Assignment | None = None) -> list[Ask]:
    async with open_session(backend=backend, assignment=assignment, store=":memory:") as session:
        with pytest.raises(AnswerError):
            await session.run(graph, Puzzle(text="x"))
        reasons = session.store.query("SELECT attempt, reason FROM asks ORDER BY attempt")
        warm = [row["attempt"] for row in reasons if "at temperature 0.7" in row["reason"]]
    assert warm == [ask.attempt for ask in backend.asks if ask.seed is not None]
    return backend.asks


async def test_a_repeated_greedy_ask_is_sampled() -> None:
    asks = await asks_of(ScriptedBackend(default=lambda ask: "junk"), one_step())
    assert [ask.temperature for ask in asks] == [0, 0, 0.7, 0.7, 0.7, 0.7]
    greedy = [(ask.messages, ask.variant) for ask in asks if ask.temperature == 0]
    assert len(greedy) == len(set(greedy))
    assert len({ask.seed for ask in asks[2:]}) == 4


async def test_a_correction_that_differs_is_greedy() -> None:
    asks = await asks_of(ScriptedBackend(default=lambda ask: f"junk {ask.attempt}"), one_step())
    assert [ask.temperature for ask in asks] == [0, 0, 0.7, 0, 0.7, 0]


async def test_the_same_run_asks_the_same_again() -> None:
    first = await asks_of(ScriptedBackend(default=lambda ask: "junk"), one_step())
    second = await asks_of(ScriptedBackend(default=lambda ask: "junk"), one_step())
    assert [ask.seed for ask in first] == [ask.seed for ask in second]


async def test_another_variant_is_change_enough() -> None:
    ladder = Assignment(roles={"solver": RoleAssignment(ladder=("small", "large"), climb_on=("unparsed",))})
    backend = ScriptedBackend(default=lambda ask: "junk")
    async with open_session(backend=backend, assignment=ladder, store=":memory:") as session:
        with pytest.raises(AnswerError):
            await session.run(one_step(), Puzzle(text="x"))
    asked = [(ask.variant, ask.temperature) for ask in backend.asks]
    assert asked == [("small", 0), ("small", 0), ("large", 0), ("large", 0), ("large", 0.7), ("large", 0.7)]


async def test_an_ask_without_a_reply_is_repeated_as_it_was() -> None:
    def lost(ask: Ask) -> Answer:
        if ask.attempt < 2:
            raise EngineDeadError("gone")
        return Answer(value=1)

    backend = ScriptedBackend(default=lost)
    async with open_session(backend=backend, store=":memory:") as session:
        assert await session.run(one_step(), Puzzle(text="x")) == Answer(value=1)
    assert [ask.temperature for ask in backend.asks] == [0, 0, 0]
