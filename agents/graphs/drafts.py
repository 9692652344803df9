"""A task graph as declared, before it is checked: steps, loops, questions, and references between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from ..errors import GraphError
from ..roles import InputType, Role, name_inputs, type_name
from .nodes import Condition, ItemRules

__all__ = [
    "Draft",
    "FieldRef",
    "GraphDraft",
    "InputRef",
    "LoopDraft",
    "PersonDraft",
    "Reference",
    "StepRef",
    "field_type",
    "function_types",
    "gives_of",
    "inputs_of",
    "item_type",
]


@dataclass(frozen=True)
class StepRef:
    """A step as other steps name it: in `after`, in `inputs`, and in conditions (`s[check].correct`)."""

    path: tuple[str, ...]
    gives: Any
    graph: str

    @property
    def name(self) -> str:
        """The step's own name."""
        return self.path[-1]

    def field(self, name: str) -> FieldRef:
        """One field of this step's output, for `inputs` and `over`; raises GraphError when there is none."""
        return FieldRef(self, name, field_type(self.gives, name, f"step {self.name!r} gives"))


@dataclass(frozen=True)
class InputRef:
    """The graph's own input as steps name it: in `inputs`, in `over` and in conditions (`s[graph.input].text`)."""

    gives: Any
    graph: str
    name: str = "input"

    def field(self, name: str) -> FieldRef:
        """One field of the input, for `inputs` and `over`; raises GraphError when there is none."""
        return FieldRef(self, name, field_type(self.gives, name, f"graph {self.graph!r} takes"))


@dataclass(frozen=True)
class FieldRef:
    """One field of a step's output, or of the graph's input."""

    step: StepRef | InputRef
    field: str
    gives: Any


Reference = StepRef | InputRef | FieldRef | str
"""How a value is named. A string names a step, which may be declared later, or `input`; `plan.parts` is a field."""


def field_type(given: Any, name: str, owner: str) -> Any:
    """Type of a model's field; raises GraphError that begins with `owner` when it has none of that name."""
    fields = getattr(given, "model_fields", {})
    if name not in fields:
        raise GraphError(
            f"{owner} {type_name(given)}, which has no field {name!r}",
            expected=f"one of {', '.join(fields) or 'no fields'}",
        )
    return fields[name].annotation


@dataclass
class Draft:
    """A step as declared, before the graph is built."""

    name: str
    work: Role | Callable[..., Any] | GraphDraft | LoopDraft | PersonDraft
    after: tuple[Reference, ...]
    inputs: Mapping[str, Reference | tuple[Reference, ...]]
    when: Condition | None = None
    over: Reference | None = None
    timeout_s: float | None = None
    retries: int = 1
    items: ItemRules = ItemRules()


@dataclass
class LoopDraft:
    """A loop as declared; the steps written inside its `with` block are its body."""

    max_rounds: int
    until: Condition | None
    on_limit: Literal["continue", "fail"]
    body: list[Draft] = field(default_factory=list)


class GraphDraft:
    """A graph as declared: its name and types, its steps, and which step gives its output."""

    def __init__(self, name: str, *, takes: type[BaseModel], gives: Any) -> None:
        self.name = name
        self.takes = takes
        self.gives = gives
        self.steps: list[Draft] = []
        self.output: Reference | tuple[Reference, ...] | None = None
        if not (isinstance(takes, type) and issubclass(takes, BaseModel)):
            raise GraphError(f"graph {name!r} takes {takes!r}", expected="a pydantic model")


@dataclass(frozen=True)
class PersonDraft:
    """A question to a person as declared."""

    takes: Any
    gives: type[BaseModel]
    question: str


def gives_of(draft: Draft) -> Any:
    """Output type of a declared step; a fan-out gives a list, a loop gives nothing by itself."""
    work = draft.work
    if isinstance(work, LoopDraft):
        return None
    if isinstance(work, Role | GraphDraft | PersonDraft):
        gives = work.gives
    else:
        gives = function_types(work)[1]
    return list[gives] if draft.over is not None else gives  # type: ignore[valid-type]


def inputs_of(draft: Draft) -> dict[str, InputType]:
    """Inputs of a declared step; a loop has none of its own."""
    work = draft.work
    match work:
        case Role():
            return dict(work.inputs)
        case PersonDraft():
            return name_inputs(work.takes, f"question {draft.name!r}")
        case GraphDraft():
            return name_inputs(work.takes, f"graph {work.name!r}")
        case LoopDraft():
            return {}
        case _:
            return function_types(work)[0]


def item_type(declared: Any) -> Any | None:
    """Type of a list's items, None when it is no list."""
    return get_args(declared)[0] if get_origin(declared) is list and get_args(declared) else None


def function_types(function: Callable[..., Any]) -> tuple[dict[str, InputType], Any]:
    """Input and output types of a function step from its annotations; raises GraphError when one is missing."""
    name = getattr(function, "__name__", repr(function))
    if not callable(function):
        raise GraphError(f"{function!r} cannot be a step", expected="a Role, a function or a TaskGraph")
    try:
        hints = get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except Exception as error:
        raise GraphError(f"the annotations of {name!r} cannot be read: {error}") from error
    missing = [p for p in parameters if p not in hints] + ([] if "return" in hints else ["return"])
    if missing:
        raise GraphError(
            f"function step {name!r} has no annotation for {', '.join(missing)}",
            expected="a type for every parameter and for the result",
            remedy=f"Write def {name}(puzzle: Puzzle) -> Verdict.",
        )
    inputs = name_inputs({p: hints[p] for p in parameters}, f"function {name!r}") if parameters else {}
    for parameter in parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            inputs[parameter.name] = replace(inputs[parameter.name], optional=True)
    return inputs, hints["return"]
