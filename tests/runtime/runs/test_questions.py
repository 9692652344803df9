"""Questions to people: each is checked against its own answer type, wherever it stands, and answered apart."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from metier.agents import ResumeError, RunInterrupted, ScriptedBackend, TaskGraph
from metier.runtime import Session, open_session
from tests.runtime.runs.listening import Listening
from tests.workflow_of_questions import Amount, Order, Topic, budget, graph

pytestmark = pytest.mark.anyio


class Topics(BaseModel):
    topics: list[Topic]


async def interrupted(session: Session, graph: TaskGraph, value: BaseModel) -> tuple[str, dict[str, str]]:
    with pytest.raises(RunInterrupted) as waits:
        await session.run(graph, value)
    assert session.batch is not None
    return session.store.runs(session.batch)[0].id, waits.value.questions


async def test_two_questions_of_one_name_are_each_checked_against_their_own_type() -> None:
    async with open_session(backend=ScriptedBackend(), store=":memory:") as session:
        run, questions = await interrupted(session, graph, Topic(name="tea"))
        assert questions == {"budget/approve": "How much for tea?", "owner/approve": "Who has tea?"}
        with pytest.raises(ResumeError, match="does not fit the question at 'owner/approve'.*Person"):
            await session.resume(graph, run, answers={"owner/approve": {"euros": 3}})
        with pytest.raises(ResumeError, match="no question at 'approve'; expected one of budget/approve, owner/appr"):
            await session.resume(graph, run, answers={"approve": {"euros": 3}})
        answers = {"owner/approve": {"who": "Ada"}, "budget/approve": Amount(euros=3)}
        assert await session.resume(graph, run, answers=answers) == Order(text="Ada: 3")


async def test_they_are_answered_apart() -> None:
    async with open_session(backend=Listening(), store=":memory:") as session:
        run, _ = await interrupted(session, graph, Topic(name="tea"))
        with pytest.raises(RunInterrupted) as waits:
            await session.resume(graph, run, answers={"owner/approve": {"who": "Ada"}})
        assert waits.value.questions == {"budget/approve": "How much for tea?"} and "--at" not in str(waits.value)
        assert await session.resume(graph, run, answers={"budget/approve": {"euros": 4}}) == Order(text="Ada: 4")


async def test_answers_are_kept_together_or_not_at_all() -> None:
    async with open_session(backend=ScriptedBackend(), store=":memory:") as session:
        run, questions = await interrupted(session, graph, Topic(name="tea"))
        with pytest.raises(ResumeError, match="does not fit"):
            await session.resume(
                graph, run, answers={"owner/approve": {"who": "Ada"}, "budget/approve": {"euros": "x"}}
            )
        assert {path: answer for path, (_, answer) in session.store.questions(run).items()} == dict.fromkeys(questions)


async def test_each_item_of_a_mapped_graph_asks_for_itself() -> None:
    """In a loop as well: `again[2]/each#1/approve` is a question of its own."""

    def split(topics: Topics) -> list[Topic]:
        return topics.topics

    def total(amounts: list[Amount]) -> Amount:
        return Amount(euros=sum(amount.euros for amount in amounts))

    mapped = TaskGraph("sum", takes=Topics, gives=Amount)
    with mapped.loop("again", max_rounds=2):
        mapped.step(total, after=mapped.map(budget(), name="each", over=mapped.step(split)))
    async with open_session(backend=Listening(), store=":memory:") as session:
        run, questions = await interrupted(session, mapped, Topics(topics=[Topic(name="tea"), Topic(name="milk")]))
        first = {"again[1]/each#0/approve": "How much for tea?", "again[1]/each#1/approve": "How much for milk?"}
        assert questions == first
        with pytest.raises(RunInterrupted) as waits:
            await session.resume(mapped, run, answers={path: {"euros": 9} for path in first})
        assert waits.value.questions == {path.replace("[1]", "[2]"): text for path, text in first.items()}
        answers = {path: {"euros": 2 + at} for at, path in enumerate(waits.value.questions)}
        assert await session.resume(mapped, run, answers=answers) == Amount(euros=5)


async def test_what_the_interrupt_says_names_a_step_where_several_wait() -> None:
    async with open_session(backend=ScriptedBackend(), store=":memory:") as session:
        with pytest.raises(RunInterrupted, match=r"session\.resume\(graph, '\S+', answers=\{'budget/approve': …\}\)"):
            await session.run(graph, Topic(name="tea"))
