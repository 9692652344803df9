"""Rows that teach a role with tools: calls are made, and what no run would do is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, Field

from metier.agents import Role, TaskSetError, ToolCall, mcp_tools, taught_rows, tool
from tests.agents.workflow import Answer, Puzzle


def double(number: int) -> int:
    """Doubles a number."""
    return 2 * number


def fail() -> str:
    """Fails."""
    raise LookupError("no such row")


def flood(characters: int) -> str:
    """Says much."""
    return "x" * characters


async def later() -> str:
    """Takes time."""
    return "now"


class Named(BaseModel):
    value: int = Field(alias="theValue")


PUZZLE = {"puzzle": Puzzle(text="21 twice?")}
ROLE = Role(
    "solver",
    takes=Puzzle,
    gives=Answer,
    tools=[double, fail, flood, later, tool(double, name="pay", repeat=False)],
    max_calls=3,
)


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def test_each_reply_is_a_row_that_sees_all_before_it() -> None:
    turns = [[call("double", number=1), call("double", number=2)], [call("double", number=4)]]
    rows = taught_rows(ROLE, PUZZLE, turns, Answer(value=8), task="21 twice?")
    assert [len(row.messages) for row in rows] == [2, 4, 6]
    assert [row.messages[:-2] for row in rows[1:]] == [row.messages for row in rows[:-1]]
    assert rows[1].messages[-2].content == rows[0].reply
    assert rows[1].messages[-1].content == "Results:\n1. double: 2\n2. double: 4"
    assert rows[2].messages[-1].content == "Results:\n1. double: 8\nNo calls are left: reply with the answer."
    assert [row.task for row in rows] == ["21 twice?"] * 3
    assert json.loads(rows[2].reply)["value"] == 8


def test_an_answer_is_written_as_the_grammar_wants_it() -> None:
    said = taught_rows(Role("r", takes=Puzzle, gives=str, tools=[double]), PUZZLE, [], 'a "b"')
    assert [row.reply for row in said] == ['"a \\"b\\""']
    assert taught_rows(Role("r", takes=Puzzle, gives=str), PUZZLE, [], 'a "b"')[0].reply == 'a "b"'
    named = Role("r", takes=Puzzle, gives=Named)
    assert taught_rows(named, PUZZLE, [], Named(theValue=3))[0].reply == '{"theValue":3}'


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([[]], "make 0 calls"),
        ([[call("double", number=1)] * 4], "make 4 calls, with 3 left"),
        ([[call("double", number=1)] * 2, [call("double", number=1)] * 2], "make 2 calls, with 1 left"),
        ([[call("halve", number=1)]], "no such tool"),
        ([[call("double", number="x")]], "arguments do not fit"),
        ([[call("double")]], "arguments do not fit"),
        ([[call("fail")]], "LookupError: no such row"),
        ([[call("flood", characters=4001)]], "gives 4001 characters"),
        ([[call("later")]], "is async"),
        ([[call("pay", number=1)]], "must not be called twice"),
    ],
)
def test_what_no_run_would_do_or_no_teacher_can_is_refused(turns: list[list[ToolCall]], problem: str) -> None:
    with pytest.raises(TaskSetError, match=problem):
        taught_rows(ROLE, PUZZLE, turns, Answer(value=1))


def test_tools_of_an_mcp_server_are_recorded_instead() -> None:
    role = Role("solver", takes=Puzzle, gives=Answer, tools=[mcp_tools("no-such-server")])
    with pytest.raises(TaskSetError, match="MCP server") as caught:
        taught_rows(role, PUZZLE, [], Answer(value=1))
    assert "--export-traffic" in caught.value.remedy
