"""A workflow file as users write one, with a scripted backend, for the tests of the command line.

With TEST_HANG set to the number of a pipe, the solver writes to it and then waits for ever: the test kills it in
the middle of a run; with TEST_GO set to another pipe, it waits until a byte comes out of that. With TEST_DIE_AT set to
n, the process kills itself (-9) at its n-th ask; with TEST_STOP_EVERY it stops itself (SIGSTOP) at every n-th one. With
TEST_RELEASE_AT set to n and TEST_RELEASE to a pipe, it writes a byte to that at its n-th ask.
"""

from __future__ import annotations

import itertools
import os
import signal

import anyio
import anyio.lowlevel
import anyio.to_thread
from pydantic import BaseModel

from metier.agents import Ask, Role, ScriptedBackend, Task, TaskGraph, TaskSet


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    expression: str


class Answer(BaseModel):
    value: int


class Approval(BaseModel):
    ok: bool


planner = Role("planner", takes=Puzzle, gives=Plan)
solver = Role("solver", takes=Plan, gives=Answer)

graph = TaskGraph("chain", takes=Puzzle, gives=Answer)
graph.step(solver, after=graph.step(planner))

asking = TaskGraph("asking", takes=Puzzle, gives=Answer)
plan = asking.step(planner)
approve = asking.ask_person(
    "approve", takes=Plan, gives=Approval, question="Is {{ plan.expression }} fine?", after=plan
)
asking.step(solver, after=approve)


def tasks(split: str, size: int, seed: int) -> TaskSet:
    """Task i is solved by the answer i."""
    made = tuple(Task(str(i), Puzzle(text=str(i)), key=i) for i in range(size))
    return TaskSet("numbers", "test", made, lambda task, output: float(output.value == task.key))


def scripted() -> ScriptedBackend:
    """Plans repeat the puzzle; the solver is right but for task 1, and hangs at task 3 when told to."""

    die_at = int(os.environ.get("TEST_DIE_AT", 0))
    stop_every = int(os.environ.get("TEST_STOP_EVERY", 0))
    release_at = int(os.environ.get("TEST_RELEASE_AT", 0))
    asked = itertools.count(1)

    def count() -> None:
        number = next(asked)
        if number == release_at:
            os.write(int(os.environ["TEST_RELEASE"]), b"1")
        if number == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if stop_every and number % stop_every == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    def plan(ask: Ask) -> Plan:
        count()
        return Plan(expression=ask.messages[1].content.split("\n")[1])

    async def solve(ask: Ask) -> Answer:
        count()
        await anyio.lowlevel.checkpoint()
        number = int(ask.messages[1].content.split("\n")[1])
        hang = os.environ.get("TEST_HANG")
        if hang and number == 3:
            os.write(int(hang), b"here")
            if go := os.environ.get("TEST_GO"):
                await anyio.to_thread.run_sync(os.read, int(go), 1)
            else:
                await anyio.sleep_forever()
        return Answer(value=-1 if number == 1 else number)

    return ScriptedBackend({"planner": plan, "solver": solve})
