"""A workflow whose role calls tools, for kill campaigns: with TEST_DIE_AT=n the process kills itself (-9) at place n.

Places are before an ask, before a tool's effect and after it. Effects are lines of the file TEST_LOG.
"""

from __future__ import annotations

import itertools
import os
import signal

from pydantic import BaseModel

from metier.agents import Ask, Role, ScriptedBackend, Task, TaskGraph, TaskSet, ToolCall, ToolCalls, tool

TURNS = 3


class Puzzle(BaseModel):
    text: str


class Answer(BaseModel):
    value: int


die_at = int(os.environ.get("TEST_DIE_AT", 0))
places = itertools.count(1)


def die_here() -> None:
    if next(places) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)


def work(name: str, task: str, number: int) -> str:
    die_here()
    with open(os.environ["TEST_LOG"], "a") as log:
        log.write(f"{name} {task} {number}\n")
    die_here()
    return f"{name} {number}"


def look(task: str, number: int) -> str:
    """Looks something up."""
    return work("look", task, number)


def send(task: str, number: int) -> str:
    """Sends something, which cannot be taken back."""
    return work("send", task, number)


solver = Role("solver", takes=Puzzle, gives=Answer, tools=[look, tool(send, repeat=False)])
graph = TaskGraph("calling", takes=Puzzle, gives=Answer)
graph.step(solver)


def tasks(split: str, size: int, seed: int) -> TaskSet:
    """Task i is solved by any answer."""
    made = tuple(Task(str(i), Puzzle(text=str(i)), key=i) for i in range(size))
    return TaskSet("numbers", "test", made, lambda task, output: 1.0)


def scripted() -> ScriptedBackend:
    """Three replies with two calls each, then the answer."""

    def solve(ask: Ask) -> ToolCalls | Answer:
        die_here()
        turn = sum(message.role == "assistant" for message in ask.messages)
        if turn == TURNS:
            return Answer(value=turn)
        task = ask.messages[1].content.split("\n")[1]
        names = ("look", "send")
        return ToolCalls(
            tool_calls=tuple(ToolCall(name=name, arguments={"task": task, "number": turn}) for name in names)
        )

    return ScriptedBackend({"solver": solve}, keep_asks=False)
