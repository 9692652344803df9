"""Word problems with numbers too large to guess: one role reads out the sum, one has it worked out by a calculator.

    metier run examples/calculator_team.py --tasks test:24
    metier run examples/calculator_team.py --tasks test:24 --engine scripted     # without a model

`solver_rows` are rows to train on: the call, and the answer behind its result.
"""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from metier.agents import (
    Ask,
    Drawn,
    Message,
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
    render_prompt,
    tool,
)
from metier.agents.tools.calls import results_text


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


def reader_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """What the reader should say."""
    for task in tasks(split, size, seed):
        yield _row(reader, render_prompt(reader, {"problem": task.input}), Sum(expression=task.key))


def solver_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """What the solver should say: a call, and behind its result the answer; two rows for each task."""
    for task in tasks(split, -(-size // 2), seed):
        prompt = render_prompt(solver, {"sum": Sum(expression=task.key)}, [tool(calculator)])
        call, value = _call(task.key), calculator(task.key)
        yield _row(solver, prompt, call)
        said = Message(role="assistant", content=call.model_dump_json())
        told = Message(role="user", content=results_text([("calculator", str(value))], solver.max_calls - 1))
        yield _row(solver, (*prompt, said, told), Answer(value=value))


def _row(role: Role, messages: tuple[Message, ...], reply: BaseModel) -> TrafficRow:
    return TrafficRow(role=role.name, messages=messages, reply=reply.model_dump_json(), score=1.0)


def _call(expression: str) -> ToolCalls:
    return ToolCalls(tool_calls=(ToolCall(name="calculator", arguments={"expression": expression}),))


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
        return _call(ask.messages[1].content.split("\n")[1])

    return ScriptedBackend({"reader": read, "solver": solve}, keep_asks=False)
