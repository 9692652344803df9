"""A workflow file for the tests of `metier probe` and `metier assign`: a fake that knows its variants.

Three variants: `sharp` is right and long-winded, `brief` is right in few words but plans badly, `wrong` is wrong.
With TEST_HANG set to the number of a pipe, the 40th ask writes to it and waits for ever; with TEST_DIE_AT set to n,
the process kills itself (-9) at its n-th ask.
"""

from __future__ import annotations

import itertools
import os
import signal

import anyio
import anyio.lowlevel
from pydantic import BaseModel

from metier.agents import Ask, Role, ScriptedBackend, Task, TaskGraph, TaskSet


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    expression: str


class Answer(BaseModel):
    value: int
    why: str = ""


class Verdict(BaseModel):
    correct: bool
    why: str = ""


planner = Role("planner", takes=(Puzzle, Verdict | None), gives=Plan)
solver = Role("solver", takes=Plan, gives=Answer)
critic = Role("critic", takes=(Puzzle, Answer), gives=Verdict)

graph = TaskGraph("probed", takes=Puzzle, gives=Answer)
with graph.loop("attempt", max_rounds=2, until=lambda s: s[check].correct):
    plan = graph.step(planner)
    solve = graph.step(solver, after=plan)
    check = graph.step(critic, after=solve)

alone = TaskGraph("alone", takes=Plan, gives=Answer)
alone.step(solver)


def tasks(split: str, size: int, seed: int) -> TaskSet:
    """Numbers to repeat; splits and seeds share none."""
    begin = {"train": 0, "tune": 10_000, "test": 20_000}[split] + 1_000 * seed
    made = tuple(Task(str(n), Puzzle(text=str(n)), key=n) for n in range(begin, begin + size))
    return TaskSet("numbers", "test", made, lambda task, output: float(output.value == task.key))


verifiers = {"planner": lambda task, plan: float(plan.expression == str(task.key))}

LONG = " ".join(["because"] * 20)


def scripted() -> ScriptedBackend:
    """Replies by variant; the base is right for even numbers only."""
    asked = itertools.count(1)

    def number(ask: Ask) -> int:
        return int(next(line for line in ask.messages[-1].content.split("\n") if line.strip().isdigit()))

    async def reply(ask: Ask) -> BaseModel:
        count = next(asked)
        if count == int(os.environ.get("TEST_DIE_AT", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        if count == 40 and os.environ.get("TEST_HANG"):
            os.write(int(os.environ["TEST_HANG"]), b"here")
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        n, variant = number(ask), ask.variant or "base"
        right = (
            variant == "sharp" or (variant == "brief" and ask.role != "planner") or (variant == "base" and n % 2 == 0)
        )
        why = LONG if variant == "sharp" else ""
        if ask.role == "planner":
            return Plan(expression=str(n if right else n + 1))
        if ask.role == "solver":
            return Answer(value=n if right else n + 1, why=why)
        return Verdict(correct=right, why=why)

    return ScriptedBackend(default=reply)
