"""Conversations: turns that are runs, shown to later ones as messages, bounded, and resumed after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import (
    Ask,
    EngineDeadError,
    GraphError,
    Message,
    ResumeError,
    Role,
    RunError,
    RunInterrupted,
    ScriptedBackend,
    TaskGraph,
    Turn,
    tool,
)
from metier.agents.errors import RunTakenError, SettingsError
from metier.runtime import RunStore, Settings, open_session
from metier.runtime.store.recovery import check_store, recover_store
from tests.agents.workflow import Answer, Puzzle, Verdict

pytestmark = pytest.mark.anyio

helper = Role("helper", takes={"message": str}, gives=str, instructions="Answer the message.")
adder = Role(
    "adder",
    takes=(Puzzle, Verdict | None),
    gives=Answer,
    instructions="Add.{% if verdict %} Mind {{ verdict.why }}{% endif %}",
    examples=(Message(role="user", content="1 + 1"), Message(role="assistant", content='{"value": 2}')),
)


class Question(BaseModel):
    text: str
    earlier: list[Turn] = []


drafter = Role("drafter", takes=Question, gives=str, instructions="Answer.")
polisher = Role("polisher", takes={"text": str, "draft": str}, gives=str, instructions="Polish.")


def helpdesk() -> TaskGraph:
    """A workflow whose drafter sees the earlier turns, and whose polisher does not."""
    graph = TaskGraph("helpdesk", takes=Question, gives=str)
    draft = graph.step(drafter)
    graph.returns(graph.step(polisher, inputs={"text": graph.input.field("text"), "draft": draft}))
    return graph


def counting() -> ScriptedBackend:
    """Says how many messages it was sent."""
    return ScriptedBackend(default=lambda ask: f"{len(ask.messages)} messages")


def said(ask: Ask) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in ask.messages]


async def test_each_prompt_of_a_role_begins_with_the_last_one_and_its_reply() -> None:
    backend = counting()
    async with open_session(backend=backend, store=":memory:") as session, session.chat(helper) as chat:
        replies = [await chat.say(text) for text in ("Hello.", '{"a": "b"}', "Bye.")]
        report = session.report()
    assert replies == ["2 messages", "4 messages", "6 messages"]
    for before, after in zip(backend.asks, backend.asks[1:], strict=False):
        assert said(after)[: len(before.messages) + 1] == [
            *said(before),
            ("assistant", f"{len(before.messages)} messages"),
        ]
    assert backend.asks[1].messages[-1].content == '# message\n{"a": "b"}\n\n# Your step: helper\nAnswer the message.'
    assert "helper" in report


async def test_turns_are_runs_of_one_batch_named_by_the_conversation() -> None:
    async with open_session(backend=counting(), store=":memory:") as session, session.chat(helper) as chat:
        assert chat.turns == [] and chat.unfinished is None
        await chat.say("Hello.")
        await chat.say("Bye.")
        runs = session.store.runs(chat.id)
        assert [(run.id, run.task, run.state) for run in runs] == [
            (f"{chat.id}.0", "1", "finished"),
            (f"{chat.id}.1", "2", "finished"),
        ]
        assert [(turn.number, turn.said, turn.reply) for turn in chat.turns] == [
            (1, "Hello.", "2 messages"),
            (2, "Bye.", "4 messages"),
        ]
        assert [row.run_id for row in session.store.traffic(chat.id)] == [run.id for run in runs]


async def test_a_role_with_types_examples_and_what_it_may_lack() -> None:
    backend = ScriptedBackend({"adder": ["no number", Answer(value=3), Answer(value=4)]})
    async with open_session(backend=backend, store=":memory:") as session, session.chat(adder) as chat:
        assert await chat.say("1 + 2") == Answer(value=3)
        assert await chat.say('{"puzzle": {"text": "and 1"}}') == Answer(value=4)
        assert chat.turns[0].reply == Answer(value=3)
    roles, texts = zip(*said(backend.asks[-1]), strict=True)
    assert roles == ("system", "user", "assistant", "user", "assistant", "user")
    assert texts[3].startswith("# puzzle\n1 + 2\n\n# Your step: adder") and texts[4] == '{"value":3}'


async def test_a_role_with_tools_is_shown_its_answers_alone() -> None:
    @tool
    def look_up(word: str) -> str:
        """Look a word up."""
        return f"about {word}"

    role = Role("clerk", takes={"message": str}, gives=Answer, tools=[look_up])
    call = {"tool_calls": [{"name": "look_up", "arguments": {"word": "cows"}}]}
    backend = ScriptedBackend({"clerk": [call, Answer(value=1), Answer(value=2)]})
    async with open_session(backend=backend, store=":memory:") as session, session.chat(role) as chat:
        assert await chat.say("One?") == Answer(value=1)
        assert await chat.say("Two?") == Answer(value=2)
    assert [m.role for m in backend.asks[-1].messages] == ["system", "user", "assistant", "user"]
    assert backend.asks[-1].messages[1] == backend.asks[0].messages[1]
    assert backend.asks[-1].messages[2].content == '{"value":1}'


async def test_a_graph_is_given_the_earlier_turns_in_its_input() -> None:
    backend = ScriptedBackend({"drafter": lambda ask: f"draft {len(ask.messages)}", "polisher": ["First.", "Second."]})
    async with open_session(backend=backend, store=":memory:") as session, session.chat(helpdesk()) as chat:
        assert [await chat.say("What?"), await chat.say(Question(text="Why?"))] == ["First.", "Second."]
    drafts, polished = (([a for a in backend.asks if a.role == role]) for role in ("drafter", "polisher"))
    assert said(drafts[1])[1:3] == [("user", "What?"), ("assistant", "First.")]
    assert drafts[1].messages[-1].content.startswith("# question\nWhy?\n\n")
    assert [len(ask.messages) for ask in polished] == [2, 2]


async def test_the_oldest_turns_fall_out_until_half_remains() -> None:
    backend = ScriptedBackend(default=lambda ask: "abc")
    settings = Settings(conversation_tokens=100)
    async with open_session(backend=backend, store=":memory:", settings=settings) as session:
        async with session.chat(helper) as chat:
            for number in range(12):
                await chat.say(f"message {number}")
    shown = [len(ask.messages) // 2 - 1 for ask in backend.asks]
    each = Turn(asked=backend.asks[0].messages[1].content, replied="abc").tokens
    most, half = 100 // each, 50 // each
    assert max(shown) == most and shown[: most + 2] == [*range(most + 1), half]
    assert "message 11" in backend.asks[-1].messages[-1].content


async def test_none_is_shown_where_none_may_be() -> None:
    backend = counting()
    settings = Settings(conversation_tokens=0)
    async with open_session(backend=backend, store=":memory:", settings=settings) as session:
        async with session.chat(helper) as chat:
            assert [await chat.say("a"), await chat.say("b")] == ["2 messages", "2 messages"]


async def test_words_come_as_they_are_written() -> None:
    pieces: list[str] = []
    async with open_session(backend=counting(), store=":memory:") as session:
        async with session.chat(helper) as chat:
            await chat.say("Hello.", on_text=pieces.append)
        async with session.chat(helpdesk()) as other:  # the polisher's alone
            await other.say("Hello.", on_text=pieces.append)
        async with session.chat(adder) as typed:
            with pytest.raises(RunError):
                await typed.say("Hello.", on_text=pieces.append)
    assert pieces == ["2 ", "messages", "2 ", "messages"]


async def test_it_goes_on_in_another_process_of_the_same_store(tmp_path: Path) -> None:
    store, backend = tmp_path / "runs.db", counting()
    async with open_session(backend=counting(), store=store) as session, session.chat(helper) as chat:
        await chat.say("Hello.")
    async with open_session(backend=backend, store=store) as session, session.chat(helper, resume=chat.id) as again:
        assert again.id == chat.id and await again.say("Still there?") == "4 messages"
        assert [turn.said for turn in again.turns] == ["Hello.", "Still there?"]
    assert said(backend.asks[0])[2] == ("assistant", "2 messages")


async def test_two_processes_do_not_talk_past_each_other(tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    async with open_session(backend=counting(), store=store) as session, session.chat(helper) as chat:
        await chat.say("Hello.")
        async with open_session(backend=counting(), store=store) as other, other.chat(helper, resume=chat.id) as theirs:
            await theirs.say("From there.")
        with pytest.raises(RunTakenError, match="has 2 turns by now, and had 1 here"):
            await chat.say("From here.")


async def test_what_is_said_at_once_becomes_turns_one_after_the_other() -> None:
    backend = counting()
    async with open_session(backend=backend, store=":memory:") as session, session.chat(helper) as chat:
        async with anyio.create_task_group() as tasks:
            for text in ("a", "b", "c"):
                tasks.start_soon(chat.say, text)
        assert [turn.reply for turn in chat.turns] == ["2 messages", "4 messages", "6 messages"]


async def test_text_that_no_file_can_hold_is_refused_and_nothing_is_left_of_it() -> None:
    async with open_session(backend=counting(), store=":memory:") as session, session.chat(helper) as chat:
        with pytest.raises(RunError, match="cannot be recorded"):
            await chat.say("half a pair: \ud800")
        assert not chat.begun and await chat.say("whole") == "2 messages"


async def test_a_turn_that_failed_goes_on_or_is_left() -> None:
    down = [True]

    def reply(ask: Ask) -> str:
        if down[0]:
            raise EngineDeadError("the engine is gone")
        return f"{len(ask.messages)} messages"

    async with open_session(backend=ScriptedBackend(default=reply), store=":memory:") as session:
        async with session.chat(helper) as chat:
            with pytest.raises(EngineDeadError):
                await chat.say("Hello.")
            assert chat.unfinished is not None and chat.unfinished.said == "Hello." and chat.unfinished.reply is None
            down[0] = False
            assert await chat.go_on() == "2 messages"
            assert chat.unfinished is None
            with pytest.raises(ResumeError, match="no turn to go on with"):
                await chat.go_on()
            down[0] = True
            with pytest.raises(EngineDeadError):
                await chat.say("Lost.")
            down[0] = False
            assert await chat.say("Next.") == "4 messages"
            assert [turn.state for turn in chat.turns] == ["finished", "failed", "finished"]


async def test_a_person_may_be_asked_within_a_turn() -> None:
    graph = TaskGraph("asks", takes=Question, gives=Verdict)
    graph.ask_person("approve", takes=Question, gives=Verdict, question="{{ question.text }}?")
    async with open_session(backend=counting(), store=":memory:") as session, session.chat(graph) as chat:
        with pytest.raises(RunInterrupted, match="go_on") as waits:
            await chat.say("Shall we")
        assert waits.value.questions == {"approve": "Shall we?"}
        assert await chat.go_on(answers={"approve": {"correct": True}}) == Verdict(correct=True)


class TwoFields(BaseModel):
    text: str
    earlier: list[Turn] = []
    other: list[Turn] = []


async def test_whoever_is_no_speaker_and_an_input_with_two_places_for_turns_are_named() -> None:
    role = Role("one", takes=TwoFields, gives=str)
    graph = TaskGraph("two", takes=TwoFields, gives=str)
    graph.step(role)
    async with open_session(backend=counting(), store=":memory:") as session:
        for speaker in (role, graph):
            with pytest.raises(GraphError, match="TwoFields has the fields earlier, other"):
                async with session.chat(speaker):
                    pass
        with pytest.raises(GraphError, match="a conversation with None.*a Role, or a TaskGraph"):
            async with session.chat(None):  # type: ignore[arg-type]
                pass


async def test_settings_of_another_type_are_named() -> None:
    with pytest.raises(SettingsError, match="settings are dict.*load_settings"):
        async with open_session(backend=counting(), store=":memory:", settings={"concurrency": 2}):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize("name", ["max_tokens", "max_calls", "memory_tokens"])
@pytest.mark.parametrize("count", ["x", None, 1.5, True, 0])
async def test_a_count_of_a_role_is_a_whole_number(name: str, count: Any) -> None:
    with pytest.raises(GraphError, match=f"has {name}=.*a whole number, at least 1"):
        Role("one", takes=Puzzle, gives=str, **{name: count})


async def test_what_cannot_be_a_conversation_is_named() -> None:
    plain = TaskGraph("plain", takes=Puzzle, gives=str)
    plain.step(Role("one", takes=Puzzle, gives=str))
    async with open_session(backend=counting(), store=":memory:") as session:
        with pytest.raises(GraphError, match=r"takes Puzzle, which has no field for the earlier turns.*list\[Turn\]"):
            async with session.chat(plain):
                pass
        with pytest.raises(GraphError, match="takes nothing that could be said"):
            async with session.chat(Role("mute", takes={}, gives=str)):
                pass
        with pytest.raises(ResumeError, match="no conversation 'nobody'"):
            async with session.chat(helper, resume="nobody"):
                pass
        two = Role("two", takes={"left": str, "right": str}, gives=str)
        async with session.chat(two) as chat:
            with pytest.raises(RunError, match="cannot be said to 'two'.*left"):
                await chat.say("Hello.")
            assert await chat.say('{"left": "a", "right": "b"}') == "2 messages"
        with pytest.raises(ResumeError, match="begun with workflow"):
            async with session.chat(helper, resume=chat.id):
                pass


async def test_a_run_that_is_no_conversation_is_not_resumed_as_one() -> None:
    async with open_session(backend=counting(), store=":memory:") as session:
        await session.run(helpdesk(), Question(text="What?"))
        with pytest.raises(ResumeError, match="no conversation"):
            async with session.chat(helpdesk(), resume=session.batch):
                pass


def test_a_store_of_a_conversation_can_be_read_and_recovered(tmp_path: Path) -> None:
    async def talk() -> str:
        async with open_session(backend=counting(), store=tmp_path / "runs.db") as session:
            async with session.chat(helper) as chat:
                await chat.say("Hello.")
                return chat.id

    id = anyio.run(talk)
    assert check_store(tmp_path / "runs.db") == []
    recover_store(tmp_path / "runs.db", tmp_path / "saved.db")
    with RunStore(tmp_path / "saved.db") as store:
        assert [run.state for run in store.runs(id)] == ["finished"]


TALK = """
import os, signal, sys
import anyio
from metier.agents import Role, ScriptedBackend
from metier.runtime import open_session

helper = Role("helper", takes={"message": str}, gives=str, instructions="Answer the message.")
left = int(sys.argv[2])

def reply(ask):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{len(ask.messages)} messages"

async def main():
    async with open_session(backend=ScriptedBackend(default=reply), store=sys.argv[1]) as session:
        known = [b.id for b in session.store.batches()]
        async with session.chat(helper, resume=known[0] if known else None) as chat:
            if chat.unfinished:
                await chat.go_on()
            while len(chat.turns) < 5:
                await chat.say(f"message {len(chat.turns) + 1}")
            for turn in chat.turns:
                print(turn.said, turn.reply)

anyio.run(main)
"""


def test_a_process_killed_within_turns_goes_on_where_it_was(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    talk = partial(subprocess.run, capture_output=True, text=True, timeout=120, env=environment)
    words: list[Any] = [sys.executable, "-c", TALK, str(tmp_path / "runs.db")]
    assert talk([*words, "2"]).returncode == -signal.SIGKILL  # in the third turn
    assert talk([*words, "0"]).returncode == -signal.SIGKILL  # in the same
    ended = talk([*words, "9"])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [f"message {n} {2 * n} messages" for n in range(1, 6)]
