"""Answers of roles while they grow, among the events of a run."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from metier.agents import Role, ScriptedBackend, TaskGraph
from metier.runtime import open_session
from metier.runtime.events import Event

pytestmark = pytest.mark.anyio


class Puzzle(BaseModel):
    text: str


class Step(BaseModel):
    what: str
    days: int


class Plan(BaseModel):
    title: str
    steps: list[Step]


WHOLE = Plan(
    title="a trip to the sea", steps=[Step(what="pack all the bags", days=1), Step(what="go by train", days=2)]
)

graph = TaskGraph("plan", takes=Puzzle, gives=str)
plan = graph.step(Role("planner", takes=Puzzle, gives=Plan))
graph.step(Role("teller", takes=Plan, gives=str), after=plan)


async def events_of(backend: ScriptedBackend, graph: TaskGraph = graph, **more: Any) -> list[Event]:
    async with open_session(backend=backend, store=":memory:") as session:
        heard: list[str] = []
        session.listen(lambda event: heard.append(event.kind))
        async with session.stream(graph, Puzzle(text="Plan it."), **more) as events:
            seen = [event async for event in events]
        assert "partial_answer" not in heard
    return seen


def answers(events: list[Event], role: str, *, whole: bool) -> list[Any]:
    found = [one.data for one in events if one.kind == "partial_answer" and one.role == role]
    return [data["answer"] for data in found if data["whole"] == whole]


async def test_answers_grow_and_end_whole() -> None:
    backend = ScriptedBackend({"planner": [WHOLE], "teller": ["We go by train."]})
    events = await events_of(backend, answers=True)
    growing = answers(events, "planner", whole=False)
    assert len(growing) > 3 and all(isinstance(one, Plan) for one in growing)
    assert growing[0].steps is None and growing[-1] == WHOLE
    assert answers(events, "planner", whole=True) == [WHOLE]
    told = answers(events, "teller", whole=False)
    assert told[-1] == "We go by train." and all(told[-1].startswith(one) for one in told)
    assert answers(events, "teller", whole=True) == ["We go by train."]
    kinds = [event.kind for event in events]
    assert kinds[-1] == "run_finished" and kinds.index("partial_answer") == kinds.index("text") + 1


async def test_they_are_not_there_unasked() -> None:
    backend = ScriptedBackend({"planner": [WHOLE], "teller": ["We go by train."]})
    assert "partial_answer" not in [event.kind for event in await events_of(backend)]


async def test_a_corrected_answer_begins_anew() -> None:
    backend = ScriptedBackend({"planner": ['{"title": "not a plan"}', WHOLE], "teller": ["Done."]})
    events = await events_of(backend, answers=True)
    titles = [one.title for one in answers(events, "planner", whole=False)]
    assert "not a plan" in titles and titles[-1] == WHOLE.title
    assert answers(events, "planner", whole=True) == [WHOLE]


async def test_items_and_rounds_grow_apart() -> None:
    many = TaskGraph("many", takes=Puzzle, gives=list[Step])
    whole = many.step(Role("planner", takes=Puzzle, gives=Plan))
    many.map(Role("doer", takes={"step": Step}, gives=Step), over=whole.field("steps"), name="each")
    by_days = {step.days: step for step in WHOLE.steps}
    backend = ScriptedBackend({"planner": [WHOLE], "doer": lambda ask: by_days[1 + ("train" in str(ask.messages))]})
    events = await events_of(backend, many, answers=True)
    paths = sorted({one.step_path for one in events if one.kind == "partial_answer" and one.role == "doer"})
    for path, step in zip(paths, WHOLE.steps, strict=True):
        grown = [one.data["answer"] for one in events if one.kind == "partial_answer" and one.step_path == path]
        assert grown[-1] == step and all(step.what.startswith(one.what) for one in grown)


async def test_a_run_that_fails_ends_the_stream_with_its_error() -> None:
    backend = ScriptedBackend(default=lambda ask: '{"title": "no steps"}')
    events = await events_of(backend, answers=True)
    assert events[-1].kind == "run_failed" and "is no Plan" in events[-1].data["error"]
    assert answers(events, "planner", whole=True) == []
