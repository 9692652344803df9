"""Calls as a model writes them: their schema, their text, their results."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel

from metier.agents import Role, ToolCall, ToolCalls, render_prompt, tool
from metier.agents.tools.calls import describe_tools, read_calls, read_text_answer, results_text, turn_schema
from tests.agents.workflow import Answer, Puzzle


class Node(BaseModel):
    name: str
    inner: list[Node] = []


def look_up(word: str, most: int = 3) -> str:
    """Finds a word."""
    return word * most


def plant(tree: Node, where: Literal["here", "there"]) -> None:
    """Plants a tree."""


TOOLS = (tool(look_up), tool(plant))


def fits(value: Any, calls_left: int = 3, answer: dict[str, Any] | None = None) -> bool:
    schema = turn_schema(TOOLS, answer or Node.model_json_schema(), calls_left)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def test_a_reply_is_calls_or_the_answer_and_nothing_else() -> None:
    tree = {"name": "oak", "inner": [{"name": "acorn"}]}
    assert fits(tree) and fits({"tool_calls": [call("look_up", word="a")]})
    assert fits({"tool_calls": [call("plant", tree=tree, where="here"), call("look_up", word="a", most=1)]})
    for wrong in (
        {"tool_calls": []},
        {"tool_calls": [call("look_up")]},
        {"tool_calls": [call("look_up", word="a", least=1)]},
        {"tool_calls": [call("nothing", word="a")]},
        {"tool_calls": [call("plant", tree={"inner": []}, where="here")]},
        {"tool_calls": [call("plant", tree=tree, where="nowhere")]},
        {"tool_calls": [call("look_up", word="a")] * 4},
    ):
        assert not fits(wrong), wrong


def test_the_last_reply_can_only_be_the_answer() -> None:
    assert turn_schema(TOOLS, Answer.model_json_schema(), 0) == Answer.model_json_schema()
    assert turn_schema(TOOLS, None, 0) == {"type": "string"}
    assert not fits({"tool_calls": [call("look_up", word="a")]}, calls_left=0)


@pytest.mark.parametrize(
    "text, names",
    [
        ('{"tool_calls": [{"name": "a", "arguments": {"x": 1}}, {"name": "b"}]}', ["a", "b"]),
        ('Sure!\n```json\n{"tool_calls": [{"name": "a"}]}\n```', ["a"]),
        ('{"tool_calls": []}', []),
    ],
)
def test_calls_are_read(text: str, names: list[str]) -> None:
    calls = read_calls(text)
    assert calls is not None and [one.name for one in calls.tool_calls] == names


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no braces",
        '{"value": 3}',
        '{"tool_calls": [{"name": "a", "arguments": {"x": 1',
        '{"tool_calls": [{"name": "a", "arguments": {}}',
        '{"tool_calls": 3}',
        '{"tool_calls": [{"arguments": {}}]}',
        '{"why": "tool_calls"}',
        '["tool_calls"]',
        "}tool_calls{",
        '"tool_calls"}{',
    ],
)
def test_what_is_no_call_is_not_read_as_one(text: str) -> None:
    assert read_calls(text) is None


def test_calls_survive_their_own_text() -> None:
    calls = ToolCalls(tool_calls=(ToolCall(name="a", arguments={"t": '"}]}\n<|im_end|>'}),))
    assert read_calls(calls.model_dump_json()) == calls


def test_a_prompt_tells_of_tools_last_and_leaves_others_as_they_are() -> None:
    role = Role("solver", takes=Puzzle, gives=Answer, instructions="Solve.", tools=TOOLS)
    plain = render_prompt(role, {"puzzle": Puzzle(text="x")})
    assert plain == render_prompt(
        Role("solver", takes=Puzzle, gives=Answer, instructions="Solve."), {"puzzle": Puzzle(text="x")}
    )
    told = render_prompt(role, {"puzzle": Puzzle(text="x")}, TOOLS)[-1].content
    before, _, after = plain[-1].content.partition("Reply as JSON")
    assert told == f"{before}{describe_tools(TOOLS)}\nReply as JSON{after}"
    assert "- look_up(word: string, most?: integer): Finds a word." in told
    assert 'where: "here" | "there"' in told
    text = Role("writer", takes=Puzzle, gives=str, tools=TOOLS)
    assert render_prompt(text, {}, TOOLS)[-1].content.endswith("To answer:\nReply as a JSON string.")


def test_results_are_told_in_order_and_the_last_ones_say_so() -> None:
    assert results_text([("a", "1"), ("b", "error: no")], 2) == "Results:\n1. a: 1\n2. b: error: no"
    assert results_text([("a", "1")], 0).endswith("No calls are left: reply with the answer.")


@pytest.mark.parametrize("text, answer", [('"a \\"b\\""', 'a "b"'), ("plain", "plain"), ("3", "3"), ('["a"]', '["a"]')])
def test_text_is_answered_as_a_json_string(text: str, answer: str) -> None:
    assert read_text_answer(text) == answer


def test_a_schema_that_is_deep_is_shown_in_short() -> None:
    class Wide(BaseModel):
        fields: dict[str, dict[str, list[tuple[int, str]]]]
        more: list[Node]

    def store(wide: Wide) -> None: ...

    store.__annotations__["wide"] = Wide
    shown = describe_tools([tool(store)])
    assert len(shown) < 700 and "…" in shown
    assert json.loads(json.dumps(turn_schema([tool(store)], None, 1)))
