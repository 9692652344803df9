"""Word problems with numbers too large to guess: one role reads out the sum, one has it worked out by a calculator.

    metier make examples/recipes/calculator_team.yaml
    metier run examples/calculator_team.py --tasks test:24 --assignment examples/calculator_team_assignment.yaml
    metier run examples/calculator_team.py --tasks test:24 --engine scripted     # without a model

`direct` is the same team without the calculator, to compare with.
"""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from pydantic import BaseModel

from metier.agents import (
    Ask,
    Drawn,
    Role,
    ScriptedBackend,
    Split,
    Task,
    TaskGraph,
    TaskSet,
    ToolCall,
    ToolCalls,
    TrafficRow,
    draw_tasks,
    taught_rows,
)


class Problem(BaseModel):
    text: str


class Sum(BaseModel):
    expression: str


class Answer(BaseModel):
    value: int


OPERATORS: dict[type[ast.operator], Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
MOST_CHARACTERS = 100


def calculator(expression: str) -> int:
    """Works out a sum of whole numbers with + - * and brackets."""
    if len(expression) > MOST_CHARACTERS:
        raise ValueError(f"more than {MOST_CHARACTERS} characters")
    return _worked_out(ast.parse(expression.strip(), mode="eval").body)


def _worked_out(part: ast.expr) -> int:
    match part:
        case ast.Constant(value=int(number)):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_worked_out(inner)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
            return int(OPERATORS[type(sign)](_worked_out(left), _worked_out(right)))
    raise ValueError(f"cannot work out {ast.unparse(part)!r}")


reader = Role("reader", takes=Problem, gives=Sum, instructions="Write the sum that answers it.", max_tokens=32)
solver = Role(
    "solver",
    takes=Sum,
    gives=Answer,
    instructions="Give its value. Let the calculator work it out.",
    max_tokens=48,
    tools=[calculator],
    max_calls=3,
)

graph = TaskGraph("calculator-team", takes=Problem, gives=Answer)
graph.step(solver, after=graph.step(reader))

direct_solver = Role("solver", takes=Sum, gives=Answer, instructions="Give its value.", max_tokens=48)

direct = TaskGraph("calculator-team-direct", takes=Problem, gives=Answer)
direct.step(direct_solver, after=direct.step(reader))

# ---- tasks ------------------------------------------------------------------------------------------------

STORIES = (
    ("{a} crates hold {b} pears each, and {c} pears are bad. How many are good?", "{a}*{b}-{c}"),
    ("A press prints {a} pages an hour. After {b} hours and {c} pages more, how many are there?", "{a}*{b}+{c}"),
    ("Of {a} visitors {b} leave, and each of the others pays {c} coins. How many coins are paid?", "({a}-{b})*{c}"),
    ("{a} red and {b} blue boxes hold {c} nails each. How many nails are there?", "({a}+{b})*{c}"),
)


def tasks(split: Split, size: int, seed: int) -> TaskSet:
    """Problems with the sums that answer them; the score is 1 for the exact value."""

    def draw(rng: random.Random) -> Drawn:
        story, expression = rng.choice(STORIES)
        numbers = {"a": rng.randint(300, 999), "b": rng.randint(12, 299), "c": rng.randint(12, 99)}
        worked_out = expression.format(**numbers)
        return Drawn(worked_out, Problem(text=story.format(**numbers)), worked_out)

    def score(task: Task, answer: Any) -> float:
        return float(isinstance(answer, Answer) and answer.value == calculator(task.key))

    return draw_tasks("calculator-team", draw, score, split=split, size=size, seed=seed)


# ---- teachers ---------------------------------------------------------------------------------------------


def team_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """What both roles should say, three rows a task: the sum, the call, and the answer behind its result."""
    return islice((row for task in tasks(split, -(-size // 3), seed) for row in _taught(task, solver)), size)


def direct_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """What both roles should say without a calculator: a third of the rows are the reader's here too."""
    every = (row for task in tasks(split, -(-size // 3) * 2, seed) for row in _taught(task, direct_solver))
    return islice((row for number, row in enumerate(every) if number % 4 != 2), size)  # not the second task's sum


def _taught(task: Task, who: Role) -> Iterator[TrafficRow]:
    given = Sum(expression=task.key)
    yield from taught_rows(reader, {"problem": task.input}, [], given)
    calls = [[_call(task.key)]] if who.tools else []
    yield from taught_rows(who, {"sum": given}, calls, Answer(value=calculator(task.key)))


def _call(expression: str) -> ToolCall:
    return ToolCall(name="calculator", arguments={"expression": expression})


# ---- without a model --------------------------------------------------------------------------------------


def scripted() -> ScriptedBackend:
    """A reader that knows the stories, and a solver that calls the calculator once."""

    def read(ask: Ask) -> Sum:
        words = ask.messages[1].content.split("\n")[1]
        story = next(e for s, e in STORIES if s.rpartition("}")[2] in words)
        a, b, c = (word.strip(".,") for word in words.split() if word.strip(".,").isdigit())
        return Sum(expression=story.format(a=a, b=b, c=c))

    def solve(ask: Ask) -> ToolCalls | Answer:
        last = ask.messages[-1].content
        if last.startswith("Results:"):
            return Answer(value=int(last.rpartition(": ")[2]))
        return ToolCalls(tool_calls=(_call(ask.messages[1].content.split("\n")[1]),))

    return ScriptedBackend({"reader": read, "solver": solve}, keep_asks=False)
