"""Talk with two roles: one drafts an answer from what was said before, the other makes it short.

    metier chat examples/helpdesk.py
    metier chat examples/helpdesk.py --role drafter

The workflow's input has a field for the earlier turns. The drafter takes the whole input, so it is shown them as
messages; the shortener takes the question and the draft alone.
"""

from __future__ import annotations

from pydantic import BaseModel

from metier.agents import Ask, Role, ScriptedBackend, TaskGraph, Turn


class Question(BaseModel):
    """What a user says, and what was said before."""

    text: str
    earlier: list[Turn] = []


drafter = Role("drafter", takes=Question, gives=str, instructions="Answer the question.")
shortener = Role(
    "shortener", takes={"question": str, "draft": str}, gives=str, instructions="Say the draft in one sentence."
)

graph = TaskGraph("helpdesk", takes=Question, gives=str)
draft = graph.step(drafter)
graph.returns(graph.step(shortener, inputs={"question": graph.input.field("text"), "draft": draft}))


def scripted() -> ScriptedBackend:
    """Tries the workflow without a model: says how many turns it was shown."""

    def write(ask: Ask) -> str:
        turns = sum(message.role == "assistant" for message in ask.messages)
        return f"After {turns} earlier turns."

    return ScriptedBackend({"drafter": write, "shortener": lambda ask: f"Draft {ask.messages[-1].content[:40]!r}"})
