"""Rows that teach a role with tools: a teacher's calls and answer, as the asks of a served step show them.

`metier run --export-traffic` records such rows of real runs; these are written by a program that knows the answer.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import MetierError, TaskSetError
from .messages import Message
from .prompts import render_prompt
from .recorded_values import type_adapter
from .roles import Role
from .tools.calls import ToolCall, ToolCalls, results_text
from .tools.tool import MOST_RESULT_CHARACTERS, Tool, result_text
from .traffic import TrafficRow
from .turns import Turn

__all__ = ["taught_rows"]


def taught_rows(
    role: Role,
    inputs: Mapping[str, Any],
    turns: Iterable[Sequence[ToolCall]],
    answer: Any,
    *,
    score: float = 1.0,
    task: str = "",
    remembered: Iterable[Turn] = (),
) -> list[TrafficRow]:
    """Rows of one step: a row for each reply that calls, and one for the answer behind the last results.

    Each of `turns` are the calls of one reply. They are made here, so that a row tells only what the tool really gives.
    Without turns there is one row, the answer at once; so it is for a role without tools. `score` and `task` are those
    of the rows. `remembered` are the earlier turns that a role with memory is shown.

    Raises: TaskSetError for a call that no run would make (a tool that the role does not have, arguments that do not
    fit, more calls than `max_calls`) or that no teacher can make (a tool that is async, raises, must not be repeated,
    gives more text than a model is told, or belongs to an MCP server).

    >>> from metier.agents import Role, ToolCall
    >>> from pydantic import BaseModel
    >>> class Sum(BaseModel):
    ...     expression: str
    >>> def double(number: int) -> int:
    ...     "Doubles a number."
    ...     return 2 * number
    >>> solver = Role("solver", takes=Sum, gives=int, tools=[double])
    >>> call = ToolCall(name="double", arguments={"number": 21})
    >>> rows = taught_rows(solver, {"sum": Sum(expression="21 + 21")}, [[call]], 42)
    >>> [row.reply for row in rows]
    ['{"tool_calls":[{"name":"double","arguments":{"number":21}}]}', '42']
    >>> print(rows[1].messages[-1].content)
    Results:
    1. double: 42
    """
    tools = _own_tools(role)
    messages = render_prompt(role, inputs, tools.values(), remembered)
    rows: list[TrafficRow] = []
    left = role.max_calls

    def teach(reply: str) -> None:
        rows.append(TrafficRow(role=role.name, messages=messages, reply=reply, score=score, task=task))

    for calls in turns:
        left -= len(calls)
        if not calls or left < 0:
            raise TaskSetError(
                f"a reply of role {role.name!r} was to make {len(calls)} calls, with {left + len(calls)} left",
                expected=f"at least one, and at most max_calls={role.max_calls} of all replies together",
            )
        reply = ToolCalls(tool_calls=tuple(calls)).model_dump_json()
        teach(reply)
        told = results_text([(call.name, _result(role, tools, call)) for call in calls], left)
        messages = (*messages, Message(role="assistant", content=reply), Message(role="user", content=told))
    teach(_written(role, answer))
    return rows


def _own_tools(role: Role) -> dict[str, Tool]:
    found = {each.name: each for each in role.tools if isinstance(each, Tool)}
    if len(found) < len(role.tools):
        raise _not_taught(f"role {role.name!r} has tools of an MCP server")
    return found


def _result(role: Role, tools: Mapping[str, Tool], call: ToolCall) -> str:
    """What the model is told of a call, which is made."""
    what = f"call of {call.name!r} with {json.dumps(call.arguments, ensure_ascii=False)}"
    if call.name not in tools:
        raise TaskSetError(
            f"{what}: role {role.name!r} has no such tool", expected=", ".join(tools) or "no call: it has no tools"
        )
    called = tools[call.name]
    if not called.repeat or inspect.iscoroutinefunction(called.function):
        raise _not_taught(f"{what}: the tool {'is async' if called.repeat else 'must not be called twice'}")
    try:
        text = result_text(called.function(**called.read(call.arguments)))
    except Exception as error:  # a tool may raise anything
        why = error.problem if isinstance(error, MetierError) else f"{type(error).__name__}: {error}"
        raise TaskSetError(f"{what}: {why}", expected="a call that succeeds") from error
    if len(text) > MOST_RESULT_CHARACTERS:
        raise TaskSetError(
            f"{what} gives {len(text)} characters",
            expected=f"at most {MOST_RESULT_CHARACTERS}, since a model is told no more",
        )
    return text


def _written(role: Role, answer: Any) -> str:
    """The answer as the model writes it: free text as a JSON string where a call could stand instead."""
    if role.gives is str:
        return json.dumps(answer, ensure_ascii=False) if role.tools else str(answer)
    return type_adapter(role.gives).dump_json(answer, by_alias=True).decode()


def _not_taught(problem: str) -> TaskSetError:
    return TaskSetError(
        problem,
        expected="a function that can be called once more",
        remedy="Train on what runs recorded instead: metier run FILE --tasks train:100 --export-traffic rows.jsonl.",
    )
