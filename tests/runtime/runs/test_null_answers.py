"""A step that takes what may be null runs without it."""

from __future__ import annotations

import pytest

from metier.agents import Role, ScriptedBackend, TaskGraph
from metier.runtime import open_session
from tests.agents.workflow import Answer, Plan, Puzzle

pytestmark = pytest.mark.anyio


async def test_a_null_answer_is_no_input_and_another_is_one() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    doubts = graph.step(Role("doubter", takes=Puzzle, gives=Plan | None))
    graph.step(Role("reader", takes=(Puzzle, Plan | None), gives=Answer), after=doubts)
    for reply, shown in (("null", False), ('{"expression":"2 + 2"}', True)):
        backend = ScriptedBackend({"doubter": [reply], "reader": [Answer(value=4)]})
        async with open_session(backend=backend, store=":memory:") as session:
            (result,) = await session.map(graph, [Puzzle(text="?")])
        assert result.output == Answer(value=4)
        assert ("# plan\n2 + 2" in backend.asks[-1].messages[-1].content) is shown
