"""Tools made of typed functions: what they say of themselves, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from metier.agents import GraphError, Role, TaskGraph, ToolError, mcp_tools, tool
from tests.agents.workflow import Answer, Puzzle


class Point(BaseModel):
    x: int
    children: list[Point] = []


def draw(point: Point, how: Literal["line", "dot"] = "dot", *, width: Annotated[int, Field(gt=0)] = 1) -> str:
    """Draws a point
    on the board.

    And much that the model need not know.
    """
    return f"{point.x} {how} {width}"


def test_a_function_is_its_own_description() -> None:
    made = tool(draw)
    assert (made.name, made.description) == ("draw", "Draws a point on the board.")
    assert list(made.parameters["properties"]) == ["point", "how", "width"]
    assert made.parameters["required"] == ["point"] and made.parameters["additionalProperties"] is False
    read = made.read({"point": {"x": 3}, "width": 2})
    assert made.function(**read) == "3 dot 2" and isinstance(read["point"], Point)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, "point: Field required"),
        ({"point": {"x": "many"}}, "point.x: Input should be a valid integer"),
        ({"point": {"x": 1}, "colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"point": {"x": 1}, "width": 0}, "width: Input should be greater than 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolError, match=f"arguments do not fit: {said}"):
        tool(draw).read(arguments)


def without_annotation(word, most: int = 3) -> str:  # type: ignore[no-untyped-def]
    return str(word)


def any_number(*words: str) -> str:
    return "".join(words)


def any_name(**words: str) -> str:
    return "".join(words)


def by_position(word: str, /) -> str:
    return word


def callback(function: Callable[[int], int]) -> int:
    return function(1)


def unknown_type(word: Nowhere) -> str:  # type: ignore[name-defined]  # noqa: F821
    return str(word)


def underscored(_word: str) -> str:
    return _word


@pytest.mark.parametrize(
    "function, said",
    [
        (without_annotation, "argument 'word' of tool 'without_annotation' has no annotation"),
        (any_number, r"argument 'words' of tool 'any_number' cannot be given by name"),
        (any_name, r"argument 'words' of tool 'any_name' cannot be given by name"),
        (by_position, "argument 'word' of tool 'by_position' cannot be given by name"),
        (callback, "the arguments of tool 'callback' have no JSON schema"),
        (unknown_type, "the arguments of tool 'unknown_type' cannot be read"),
        (underscored, "argument '_word' of tool 'underscored' cannot be given by name"),
        (lambda: 1, "tool name '<lambda>' cannot be written in a call"),
        (functools.partial(by_position, "x"), r"the arguments of tool functools\.partial.* cannot be read"),
    ],
)
def test_what_no_model_can_call_is_refused(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(GraphError, match=said):
        tool(function)


def now() -> str:
    return "noon"


@pytest.mark.parametrize(
    "tools, said",
    [
        ([now, tool(draw, name="now")], "role 'solver' has two tools named 'now'"),
        ([now, 3], "role 'solver' has the tool 3"),
        ("now", "role 'solver' has tools='now'"),
        ([without_annotation], "has no annotation"),
    ],
)
def test_a_role_refuses_tools_that_cannot_work(tools: Any, said: str) -> None:
    with pytest.raises(GraphError, match=said):
        Role("solver", takes=Puzzle, gives=Answer, tools=tools)


def test_a_role_with_tools_has_its_bounds() -> None:
    class Calls(BaseModel):
        tool_calls: int

    with pytest.raises(GraphError, match="gives Calls with a field 'tool_calls'"):
        Role("solver", takes=Puzzle, gives=Calls, tools=[now])
    with pytest.raises(GraphError, match="max_calls=0"):
        Role("solver", takes=Puzzle, gives=Answer, tools=[now], max_calls=0)
    with pytest.raises(GraphError, match="timeout_s=0"):
        tool(now, timeout_s=0)


def test_other_tools_make_another_workflow() -> None:
    def built(**of_role: Any) -> str:
        graph = TaskGraph("solve", takes=Puzzle, gives=Answer)
        graph.step(Role("solver", takes=Puzzle, gives=Answer, **of_role))
        return graph.build().fingerprint

    with_tools = [built(tools=tools) for tools in ([now], [now, draw], [mcp_tools("a")], [mcp_tools("a", ["b"])])]
    assert len({built(), *with_tools}) == 5
    assert built(tools=[now]) == with_tools[0]


@pytest.mark.parametrize("address", ["", "  ", "python 'unclosed"])
def test_an_address_that_is_no_command_is_refused(address: str) -> None:
    with pytest.raises(GraphError):
        mcp_tools(address)


def test_an_address_is_a_command_or_a_url() -> None:
    assert mcp_tools("uvx server --at 'a b'", ["x"]).command == ["uvx", "server", "--at", "a b"]
    assert mcp_tools("https://example.org/mcp").command is None
