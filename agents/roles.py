"""What an agent does: name, instructions, input and output types, and how it may sample."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter

from .errors import GraphError
from .messages import Message
from .thinking import ThinkingProfile
from .tools.calls import CALLS
from .tools.declared import DeclaredTool, declared_tools

__all__ = ["InputType", "Role", "input_name", "name_inputs", "type_name"]

_TEMPLATES = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=False)
_NAME = re.compile(r"[a-z][a-z0-9_-]*\Z")


@dataclass(frozen=True)
class InputType:
    """One declared input: its type, and whether it may be missing (`T | None`)."""

    type: Any
    optional: bool = False


@dataclass(frozen=True)
class Role:
    """What an agent does; the same role may appear at several steps of a workflow.

    `takes` is a type, a tuple of types or a dict of name to type; `T | None` marks an input that may be
    missing, such as the last round's verdict. `gives` is any type that pydantic reads from JSON (asked for by
    schema) or `str` (free text). `instructions` is a Jinja template over the inputs, named as in `takes` or by the type
    in snake case: `{{ puzzle.text }}`. `thinking` is how long the role thinks before it answers (`max_tokens` then
    bounds the answer alone); an assignment may say otherwise. `examples` are asks of the user and replies of the
    assistant in turns, shown before each ask of the role. `tools` are typed functions, tools and MCP servers that it
    may call, at most `max_calls` times in a step, before it answers; they are kept as `Tool` and `McpServer`. With
    `memory` it is shown its own earlier turns of the same run, the newest of them up to `memory_tokens`. Raises
    GraphError when any of this cannot work.

    >>> from pydantic import BaseModel
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> class Answer(BaseModel):
    ...     value: int
    >>> solver = Role("solver", takes=Puzzle, gives=Answer, instructions="Solve it: {{ puzzle.text }}")
    >>> list(solver.inputs)
    ['puzzle']
    """

    name: str
    takes: Any
    gives: Any
    instructions: str = ""
    max_tokens: int = field(default=256, kw_only=True)
    temperature: float = field(default=0.0, kw_only=True)
    top_p: float = field(default=1.0, kw_only=True)
    thinking: ThinkingProfile | None = field(default=None, kw_only=True)
    examples: tuple[Message, ...] = field(default=(), kw_only=True)
    tools: Sequence[DeclaredTool] = field(default=(), kw_only=True)
    max_calls: int = field(default=8, kw_only=True)
    memory: bool = field(default=False, kw_only=True)
    memory_tokens: int = field(default=1024, kw_only=True)
    inputs: Mapping[str, InputType] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.match(self.name):
            raise GraphError(
                f"role name {self.name!r} cannot be used in step paths",
                expected="lower-case letters, digits, '-' and '_', starting with a letter",
                remedy="Rename the role.",
            )
        object.__setattr__(self, "inputs", name_inputs(self.takes, f"role {self.name!r}"))
        try:
            known = self.gives is not None and TypeAdapter(self.gives) is not None
        except Exception as error:  # of what is no type, pydantic raises anything
            # What is named and not defined yet may be later: the graph's build looks again.
            known = isinstance(error, PydanticUndefinedAnnotation | NameError)
            known = known or (isinstance(error, PydanticUserError) and error.code == "class-not-fully-defined")
        if not known:
            raise GraphError(
                f"role {self.name!r} gives {self.gives!r}",
                expected="str for free text, a pydantic model, or another type that pydantic validates",
                remedy="Wrap the answer in a pydantic model.",
            )
        for name in ("max_tokens", "max_calls", "memory_tokens"):
            count = getattr(self, name)
            if type(count) is not int or count < 1:
                raise GraphError(f"role {self.name!r} has {name}={count!r}", expected="a whole number, at least 1")
        if not 0.0 <= self.temperature or not 0.0 < self.top_p <= 1.0:
            raise GraphError(
                f"role {self.name!r} has temperature={self.temperature}, top_p={self.top_p}",
                expected="temperature >= 0 and 0 < top_p <= 1",
            )
        if not isinstance(self.thinking, ThinkingProfile | None):
            raise GraphError(
                f"role {self.name!r} has thinking={self.thinking!r}",
                expected="a ThinkingProfile",
                remedy="Write thinking=ThinkingProfile(max_tokens=64).",
            )
        if [message.role for message in self.examples] != ["user", "assistant"] * (len(self.examples) // 2):
            raise GraphError(
                f"role {self.name!r} has examples of {', '.join(message.role for message in self.examples)}",
                expected="messages of user and assistant in turns, ending with the assistant's",
            )
        self._check_memory()
        self._check_tools()
        self._check_template()

    def _check_memory(self) -> None:
        if not isinstance(self.memory, bool):
            raise GraphError(
                f"role {self.name!r} has memory={self.memory!r}",
                expected="True or False",
                remedy="Write memory=True, and memory_tokens=… for how much is shown.",
            )

    def _check_tools(self) -> None:
        object.__setattr__(self, "tools", declared_tools(self.tools, f"role {self.name!r}"))
        if not self.tools:
            return
        if CALLS in getattr(self.gives, "model_fields", {}):
            raise GraphError(
                f"role {self.name!r} has tools and gives {type_name(self.gives)} with a field {CALLS!r}",
                expected="another name: a reply with that field is a call",
                remedy="Rename the field.",
            )

    def _check_template(self) -> None:
        try:
            used = meta.find_undeclared_variables(_TEMPLATES.parse(self.instructions))
        except TemplateSyntaxError as error:
            raise GraphError(
                f"instructions of role {self.name!r} are not a template: {error}",
                remedy="Close every '{{ … }}', or write braces as '{{ \"{\" }}'.",
            ) from error
        unknown = sorted(used - set(self.inputs))
        if unknown:
            raise GraphError(
                f"instructions of role {self.name!r} use {', '.join(map(repr, unknown))}",
                expected=f"only its inputs: {', '.join(self.inputs) or 'none'}",
                remedy="Add the input to `takes`, or correct the name.",
            )

    def render_instructions(self, inputs: Mapping[str, Any]) -> str:
        """Fill the instructions with the inputs; a missing optional input is None.

        Raises: GraphError when the template reads a field that an input does not have.
        """
        if "{" not in self.instructions:
            return self.instructions.strip()
        values = {name: inputs.get(name) for name in self.inputs}
        try:
            return _TEMPLATES.from_string(self.instructions).render(values).strip()
        except Exception as error:
            raise GraphError(
                f"instructions of role {self.name!r} cannot be filled: {error}",
                expected=f"fields of {', '.join(self.inputs)}",
                remedy="Correct the field name; guard optional inputs with '{% if name %}'.",
            ) from error


def name_inputs(takes: Any, owner: str) -> dict[str, InputType]:
    """Normalise `takes` to named input types; raises GraphError naming `owner` when that cannot be done."""
    if isinstance(takes, Mapping):
        named = list(takes.items())
    else:
        declared = takes if isinstance(takes, tuple) else (takes,)
        named = [(input_name(t, owner), t) for t in declared]
    inputs: dict[str, InputType] = {}
    for name, declared_type in named:
        if not isinstance(name, str) or not name.isidentifier():
            raise GraphError(f"{owner} has an input named {name!r}", expected="a Python identifier")
        if name in inputs:
            raise GraphError(
                f"{owner} takes two inputs named {name!r}",
                expected="different names",
                remedy=f"Name them: takes={{'first': {type_name(declared_type)}, 'second': …}}.",
            )
        inputs[name] = _input_type(declared_type)
    return inputs


def _input_type(declared: Any) -> InputType:
    if get_origin(declared) in (Union, types.UnionType):
        members = [m for m in get_args(declared) if m is not type(None)]
        if len(members) == 1 and len(get_args(declared)) == 2:
            return InputType(members[0], optional=True)
    return InputType(declared)


def input_name(declared: Any, owner: str) -> str:
    """Default name of an input: its type in snake case, `list[Answer]` as `answers`."""
    inner = _input_type(declared).type
    if get_origin(inner) is list:
        return input_name(get_args(inner)[0], owner) + "s"
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", inner.__name__).lower()
    raise GraphError(
        f"{owner} takes {type_name(declared)} without a name",
        expected="a pydantic model, or a name for any other type",
        remedy=f"Write takes={{'name': {type_name(declared)}}}.",
    )


def type_name(declared: Any) -> str:
    """A type as people write it, for messages and pictures."""
    if get_origin(declared) in (Union, types.UnionType):
        return " | ".join(type_name(t) for t in get_args(declared))
    if get_origin(declared) is Annotated:
        return type_name(get_args(declared)[0])
    if get_origin(declared) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(declared)))}]"
    if get_origin(declared) is not None:
        return f"{get_origin(declared).__name__}[{', '.join(map(type_name, get_args(declared)))}]"
    if declared is type(None):
        return "None"
    return getattr(declared, "__name__", str(declared))
