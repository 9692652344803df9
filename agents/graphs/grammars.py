"""Which grammar holds what the roles of a workflow reply."""

from __future__ import annotations

from typing import Literal

from ..answers.answer_schema import answer_schema
from ..answers.held_schema import grammar_of, served_schema
from ..roles import Role
from ..tools.calls import turn_schema
from ..tools.tool import Tool

__all__ = ["reply_grammar"]


def reply_grammar(role: Role) -> Literal["xgrammar", "guidance"] | None:
    """The grammar that an engine holds a role's replies to; None for free text.

    A reply may be calls of the role's functions, too. Tools of MCP servers are not known before a run calls them, and
    are left out here.

    >>> from typing import Annotated
    >>> from pydantic import Field
    >>> reply_grammar(Role("counter", takes={"text": str}, gives=int))
    'xgrammar'
    >>> reply_grammar(Role("five", takes={"text": str}, gives=Annotated[int, Field(multiple_of=5)]))
    'guidance'
    """
    answer = answer_schema(role.gives)
    if not role.tools:
        return None if answer is None else grammar_of(answer)
    functions = [each for each in role.tools if isinstance(each, Tool)]
    return grammar_of(served_schema(turn_schema(functions, answer, role.max_calls)))
