"""A resumed run has the values that it had before: inputs, answers of steps, answers of people."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, computed_field

from metier.agents import Ask, AskRejectedError, Role, RunError, RunInterrupted, ScriptedBackend, StepError, TaskGraph
from metier.agents.errors import ResumeError
from metier.runtime import RunStore, open_session

pytestmark = pytest.mark.anyio


class Value(BaseModel):
    """Everything that once came back as something else."""

    model_config = ConfigDict(extra="forbid")

    share: float = Field(alias="theShare")
    camel: int = Field(1, alias="share")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        """Twice the number."""
        return 2 * self.camel


VALUES = [Value(theShare=share, share=7) for share in (math.nan, math.inf, -math.inf, 0.1)]


class Down:
    """The second role is down until it is mended."""

    def __init__(self) -> None:
        self.up = False
        self.prompts: list[str] = []

    def __call__(self, ask: Ask) -> str:
        self.prompts.append(ask.messages[-1].content)
        if not self.up:
            raise AskRejectedError("down for now")
        return "fine"


@pytest.mark.parametrize("value", VALUES, ids=repr)
async def test_a_resumed_run_has_the_values_it_had(value: Value) -> None:
    """The nan_resume case: what a step got is its content key, so that a value that changed cannot be resumed."""
    graph = TaskGraph("g", takes=Value, gives=str)
    first = graph.step(Role("first", takes=Value, gives=str))

    def same(text: str, given: Value) -> Value:
        return given

    middle = graph.step(same, inputs={"text": first})
    graph.step(Role("last", takes=Value, gives=str), name="last", inputs={"value": middle})
    graph.returns("last")
    down = Down()
    backend = ScriptedBackend({"first": lambda ask: "one", "last": down})
    with RunStore(":memory:") as store:
        async with open_session(backend=backend, store=store) as session:
            (result,) = await session.map(graph, [value])
            assert isinstance(result.error, AskRejectedError)
            down.up = True
            assert await session.resume(graph, result.run_id) == "fine"
        assert [ask.role for ask in backend.asks] == ["first", "last", "last"]
        assert down.prompts[0] == down.prompts[1]


async def test_a_person_answers_with_an_object_that_has_aliases() -> None:
    graph = TaskGraph("g", takes=Value, gives=Value)
    asked = graph.ask_person("which", takes=Value, gives=Value, question="Which?")
    graph.returns(asked)
    async with open_session(backend=ScriptedBackend(), store=":memory:") as session:
        for answer in (VALUES[0], {"theShare": math.nan, "share": 7}):
            with pytest.raises(RunInterrupted):
                await session.run(graph, VALUES[3])
            assert session.batch is not None
            (run,) = session.store.runs(session.batch)
            output = await session.resume(graph, run.id, answers={"which": answer})
            assert repr(output) == repr(VALUES[0])


class Accepted(BaseModel):
    why: str


class Refused(BaseModel):
    why: str


class Verdict(BaseModel):
    verdict: Accepted | Refused


async def test_a_value_that_would_come_back_as_another_is_an_error_of_its_step() -> None:
    def judge(value: Value) -> Verdict:
        return Verdict(verdict=Refused(why="no") if value.share == 0.1 else Accepted(why="yes"))

    graph = TaskGraph("g", takes=Value, gives=Verdict)
    graph.step(judge)
    async with open_session(backend=ScriptedBackend(), store=":memory:") as session:
        results = await session.map(graph, VALUES)
        assert [type(result.error) for result in results] == [type(None)] * 3 + [StepError]
        assert "a discriminator tells members of a union apart" in str(results[3].error)


class More(Value):
    more: Any = None


async def test_an_input_that_cannot_be_recorded_is_refused_before_anything_runs() -> None:
    graph = TaskGraph("g", takes=Value, gives=str)
    graph.step(Role("first", takes=Value, gives=str))
    backend = ScriptedBackend({"first": lambda ask: "one"})
    async with open_session(backend=backend, store=":memory:") as session:
        with pytest.raises(RunError, match=r"task '1' cannot be recorded: its JSON is read back as Value"):
            await session.map(graph, [VALUES[0], More(theShare=1.0)])
        assert not backend.asks and session.batch is None


async def test_one_unreadable_input_does_not_keep_the_others_from_resuming() -> None:
    graph = TaskGraph("g", takes=Value, gives=str)
    down = Down()
    graph.step(Role("first", takes=Value, gives=str))
    with RunStore(":memory:") as store:
        async with open_session(backend=ScriptedBackend({"first": down}), store=store) as session:
            results = await session.map(graph, VALUES)
            with store.transaction() as db:  # as earlier versions recorded NaN
                db.execute("UPDATE runs SET input = ? WHERE id = ?", ('{"share":null,"camel":7}', results[1].run_id))
            down.up = True
            assert session.batch is not None
            resumed = await session.resume_batch(graph, session.batch)
            assert [one.output for one in resumed] == ["fine", None, "fine", "fine"]
            assert isinstance(resumed[1].error, ResumeError)
            assert "the recorded input of run" in str(resumed[1].error)
