"""Roles with memory: which turns a step is shown, and what falls out."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import (
    Ask,
    GraphError,
    Role,
    ScriptedBackend,
    TaskGraph,
    ThinkingProfile,
    Turn,
    taught_rows,
    tool,
)
from metier.agents.graphs.pictures import to_dot, to_mermaid
from metier.agents.graphs.workflow_shape import workflow_shape
from metier.router.route import Router
from metier.runtime import RunStore, Session, load_settings, open_session
from metier.runtime.runs.memory import check_memory
from tests.agents.workflow import Answer, Puzzle, Verdict

pytestmark = pytest.mark.anyio


class People(BaseModel):
    names: list[str]


speaker = Role("speaker", takes=(Puzzle, Verdict | None), gives=str, instructions="Speak.", memory=True)
judge = Role("judge", takes={"text": str}, gives=Verdict)


def debate(role: Role = speaker, rounds: int = 3) -> TaskGraph:
    """A speaker with memory and a judge without, in a loop."""
    graph = TaskGraph("debate", takes=Puzzle, gives=role.gives)
    with graph.loop("talk", max_rounds=rounds):
        said = graph.step(role)
        graph.step(judge, inputs={"text": said} if role.gives is str else {"text": graph.input.field("text")})
    graph.returns(said)
    return graph


def numbered(**scripts: Any) -> ScriptedBackend:
    """The judge says in which round it is, all others say where they are."""
    verdict = lambda ask: Verdict(correct=False, why=f"round {ask.round}")  # noqa: E731
    return ScriptedBackend({"judge": verdict, **scripts}, default=lambda ask: f"said at {ask.step_path}")


async def run(graph: TaskGraph, backend: ScriptedBackend, value: BaseModel | None = None) -> Any:
    async with open_session(backend=backend, store=":memory:") as session:
        return await session.run(graph, value or Puzzle(text="x"))


def said(ask: Ask) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in ask.messages]


def remembered(ask: Ask) -> list[str]:
    """The replies that an ask shows."""
    return [message.content for message in ask.messages if message.role == "assistant"]


def asks_of(backend: ScriptedBackend, role: str) -> dict[str, Ask]:
    return {ask.step_path: ask for ask in backend.asks if ask.role == role}


async def test_each_round_begins_with_the_whole_last_one() -> None:
    backend = numbered()
    await run(debate(), backend)
    first, second, third = asks_of(backend, "speaker").values()
    assert [role for role, _ in said(first)] == ["system", "user"]
    assert said(second)[:-1] == [*said(first), ("assistant", "said at talk[1]/speaker")]
    assert said(third)[:-1] == [*said(second), ("assistant", "said at talk[2]/speaker")]
    assert "why: round 2" in third.messages[-1].content
    assert [len(ask.messages) for ask in asks_of(backend, "judge").values()] == [2, 2, 2]


async def test_the_steps_of_one_role_remember_together() -> None:
    """A step sees the steps that it waits for, not one that runs beside it; in the next round it sees both."""
    graph = TaskGraph("g", takes=Puzzle, gives=str)
    with graph.loop("talk", max_rounds=2):
        opening = graph.step(speaker, name="opening")
        graph.step(speaker, name="left", after=opening)
        right = graph.step(speaker, name="right", after=opening)
    closing = graph.step(speaker, name="closing", after="talk")
    graph.returns(closing)
    backend = numbered()
    await run(graph, backend)
    shown = {path: [text.removeprefix("said at ") for text in remembered(ask)] for path, ask in _asks(backend)}
    first = ["talk[1]/opening", "talk[1]/left", "talk[1]/right"]
    assert right.name == "right" and shown == {
        "talk[1]/opening": [],
        "talk[1]/left": ["talk[1]/opening"],
        "talk[1]/right": ["talk[1]/opening"],
        "talk[2]/opening": first,
        "talk[2]/left": [*first, "talk[2]/opening"],
        "talk[2]/right": [*first, "talk[2]/opening"],
        "closing": [*first, "talk[2]/opening", "talk[2]/left", "talk[2]/right"],
    }


def _asks(backend: ScriptedBackend) -> list[tuple[str, Ask]]:
    return [(ask.step_path, ask) for ask in backend.asks if ask.role == "speaker"]


async def test_items_see_their_own_turns_whoever_is_faster() -> None:
    """Two people talk at once in two rounds, and a step of the same role listens: it shares nobody's memory."""
    person = Role("person", takes={"name": str}, gives=str, memory=True)
    graph = TaskGraph("g", takes=People, gives=list[str])
    with graph.loop("talk", max_rounds=2):
        told = graph.map(person, over=graph.input.field("names"))
    graph.returns(told)
    done: dict[str, anyio.Event] = {f"talk[{n}]/person#1": anyio.Event() for n in (1, 2)}

    async def reply(ask: Ask) -> str:
        if ask.step_path in done:
            done[ask.step_path].set()
        else:
            await done[ask.step_path.replace("#0", "#1")].wait()
        return f"{ask.step_path} says so"

    backend = ScriptedBackend(default=reply)
    await run(graph, backend, People(names=["Ann", "Bob"]))
    shown = {path: remembered(ask) for path, ask in asks_of(backend, "person").items()}
    assert shown == {
        "talk[1]/person#0": [],
        "talk[1]/person#1": [],
        "talk[2]/person#0": ["talk[1]/person#0 says so"],
        "talk[2]/person#1": ["talk[1]/person#1 says so"],
    }


async def test_sub_graphs_remember_along_the_workflow() -> None:
    """Mapped sub-graphs with loops inside, in a loop: each item sees its own place and what came before the fan-out."""
    inner = TaskGraph("inner", takes=Puzzle, gives=str)
    with inner.loop("again", max_rounds=2):
        inner.returns(inner.step(speaker))

    class Puzzles(BaseModel):
        puzzles: list[Puzzle]

    opener = Role("speaker", takes=Puzzles, gives=str, memory=True)
    graph = TaskGraph("g", takes=Puzzles, gives=list[str])
    first = graph.step(opener, name="first")
    with graph.loop("talk", max_rounds=2, after=first):
        told = graph.map(inner, over=graph.input.field("puzzles"), name="team")
    graph.step(opener, name="last", after="talk")
    graph.returns(told)
    backend = numbered()
    await run(graph, backend, Puzzles(puzzles=[Puzzle(text="a"), Puzzle(text="b")]))
    shown = {path: [text.removeprefix("said at ") for text in remembered(ask)] for path, ask in _asks(backend)}
    assert shown["talk[1]/team#0/again[1]/speaker"] == ["first"]
    assert shown["talk[2]/team#1/again[2]/speaker"] == [
        "first",
        "talk[1]/team#1/again[1]/speaker",
        "talk[1]/team#1/again[2]/speaker",
        "talk[2]/team#1/again[1]/speaker",
    ]
    assert shown["last"] == ["first"]


async def test_the_oldest_fall_out_until_half_remains() -> None:
    role = Role("speaker", takes=Puzzle, gives=str, memory=True, memory_tokens=200)
    backend = numbered()
    await run(debate(role, rounds=12), backend)
    asks = list(asks_of(backend, "speaker").values())
    shown = [remembered(ask) for ask in asks]
    verdicts = {ask.round: ask.messages[-1].content for ask in asks}
    for ask, replies in zip(asks, shown, strict=True):
        turns = [Turn(asked=verdicts[ask.round - back], replied=reply) for back, reply in enumerate(replies[::-1], 1)]
        assert ask.messages[0] == asks[0].messages[0] and sum(turn.tokens for turn in turns) <= 200
        assert replies == [f"said at talk[{n}]/speaker" for n in range(ask.round - len(turns), ask.round)]
    grew = [later[:-1] == earlier for earlier, later in zip(shown, shown[1:], strict=False)]
    assert grew.count(False) in range(1, 5), "the beginning stays the same for several rounds"


async def test_only_what_was_accepted_is_remembered() -> None:
    """Corrections, retries, thinking and calls of tools are not shown again; the prompt is, as it was sent."""

    @tool
    def look_up(word: str) -> str:
        """Look a word up."""
        return f"about {word}"

    role = Role(
        "clerk", takes=Puzzle, gives=Answer, memory=True, tools=[look_up], thinking=ThinkingProfile(max_tokens=8)
    )
    call = {"tool_calls": [{"name": "look_up", "arguments": {"word": "cows"}}]}
    replies = [call, "no", "no", "no", '<think>three</think>{"value":3}', Answer(value=4)]
    backend = numbered(clerk=replies)
    async with open_session(backend=backend, store=":memory:") as session:
        assert await session.run(debate(role, rounds=2), Puzzle(text="x")) == Answer(value=4)
        assert session.batch is not None
        rows = [row for row in session.store.traffic(session.batch) if row.role == "clerk"]
    first, last = backend.asks[0], asks_of(backend, "clerk")["talk[2]/clerk"]
    assert "look_up" in first.messages[1].content
    assert said(last)[:-1] == [*said(first), ("assistant", '{"value":3}')]
    assert rows[-1].messages == last.messages and rows[-1].prompt_layout == first.prompt_layout
    turn = Turn(asked=first.messages[1].content, replied='{"value":3}')
    (row,) = taught_rows(role, {"puzzle": Puzzle(text="x")}, [], Answer(value=4), remembered=[turn])
    assert (row.messages, row.reply) == (rows[-1].messages, rows[-1].reply)


async def test_a_conversation_shows_its_turns_before_those_of_the_run() -> None:
    role = Role("speaker", takes={"text": str, "earlier": list[Turn]}, gives=str, memory=True)

    class Question(BaseModel):
        text: str
        earlier: list[Turn] = []

    graph = TaskGraph("talk", takes=Question, gives=str)
    with graph.loop("round", max_rounds=2):
        inputs = {"text": graph.input.field("text"), "earlier": graph.input.field("earlier")}
        graph.returns(graph.step(role, inputs=inputs))
    backend = numbered(speaker=["one", "two", "three", "four"])
    async with open_session(backend=backend, store=":memory:") as session, session.chat(graph) as chat:
        await chat.say("Hello.")
        await chat.say("Bye.")
    assert [remembered(ask) for ask in backend.asks] == [[], ["one"], ["two"], ["two", "three"]]


def test_pictures_and_the_fingerprint_tell_of_memory() -> None:
    built = debate().build()
    forgets = debate(Role("speaker", takes=(Puzzle, Verdict | None), gives=str, instructions="Speak.")).build()
    assert built.fingerprint != forgets.fingerprint
    for picture in (to_mermaid(built), to_dot(built)):
        assert "speaker → str, remembers" in picture and "judge → Verdict, remembers" not in picture
    steps = dict(workflow_shape(built).walk())
    assert steps["talk/speaker"].memory and not steps["talk/judge"].memory


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"memory": 512}, "has memory=512: expected True or False"),
        ({"memory": True, "memory_tokens": 0}, "has memory_tokens=0: expected a whole number, at least 1"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(GraphError) as raised:
        Role("speaker", takes=Puzzle, gives=str, **fields)
    assert problem.split(": expected ")[0] in str(raised.value) and problem.split(": ")[1] in str(raised.value)


def test_a_memory_longer_than_the_context_is_refused() -> None:
    thinker = Role(
        "thinker", takes=Puzzle, gives=str, memory=True, max_tokens=100, thinking=ThinkingProfile(max_tokens=100)
    )
    graph = debate(thinker).build()
    check_memory(graph, 2048)
    with pytest.raises(GraphError, match="remembers up to memory_tokens=1024 and writes up to 200 tokens, and the eng"):
        check_memory(graph, 1224)


async def test_a_session_with_an_engine_checks_it_before_anything_is_recorded() -> None:
    backend, settings = numbered(), load_settings(overrides={"engine.max_model_tokens": 1024})
    with RunStore(":memory:") as store:
        session = Session(backend, Router(), store, settings, base="0123456789abcdef")
        with pytest.raises(GraphError, match="the engine's context has 1024"):
            await session.run(debate(), Puzzle(text="x"))
        assert not store.batches() and not backend.asks
