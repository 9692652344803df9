"""What `say` takes in a conversation, and the programs of its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import metier.runtime
from metier.agents import Role, RunError, ScriptedBackend, TaskGraph, Turn
from metier.runtime import open_session

PAGE = Path(__file__).parents[3] / "docs" / "conversations.md"
TURN = Turn(asked="Before?", replied="Before.")

helper = Role("helper", takes={"message": str}, gives=str, instructions="Answer the message.")


class Question(BaseModel):
    text: str
    earlier: list[Turn] = []


def counting() -> ScriptedBackend:
    """Says how many messages it was sent."""
    return ScriptedBackend(default=lambda ask: f"{len(ask.messages)} messages")


@pytest.mark.anyio
@pytest.mark.parametrize("as_json", [True, False])
async def test_turns_are_not_said(as_json: bool) -> None:
    graph = TaskGraph("answering", takes=Question, gives=str)
    graph.step(Role("drafter", takes=Question, gives=str))
    question = Question(text="Hi", earlier=[TURN])
    async with open_session(backend=counting(), store=":memory:") as session, session.chat(graph) as chat:
        with pytest.raises(RunError, match="has turns in 'earlier'.*Leave 'earlier' out"):
            await chat.say(question.model_dump_json() if as_json else question)
        assert not chat.begun


@pytest.mark.anyio
async def test_an_object_that_does_not_fit_is_said_as_text() -> None:
    async with open_session(backend=counting(), store=":memory:") as session, session.chat(helper) as chat:
        await chat.say('{"messag": "Hi"}')
        assert [turn.said for turn in chat.turns] == ['{"messag": "Hi"}']


def test_the_page_shows_programs_that_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(metier.runtime, "open_session", lambda base: open_session(backend=counting(), store=":memory:"))
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M):
        exec(compile(block, PAGE.name, "exec"), {"__name__": "page"})
    assert "['What is a cow?', 'And its calf?']" in capsys.readouterr().out
