"""TaskGraph: write a workflow as steps and loops; `build` checks all of it before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from ..errors import GraphError
from ..roles import Role
from .build import build_graph
from .drafts import Draft, FieldRef, GraphDraft, InputRef, LoopDraft, PersonDraft, Reference, StepRef, gives_of
from .nodes import ITEMS_AT_ONCE, BuiltGraph, Condition, ItemRules
from .pictures import to_mermaid
from .step_paths import RESERVED
from .svg import graph_html

__all__ = ["TaskGraph"]

MAX_ROUNDS_LIMIT = 1000
"""No loop may be declared longer than this many rounds."""

MOST_ERROR = 2_000
"""Characters that a notebook shows of why a workflow cannot be built."""


class TaskGraph(GraphDraft):
    """A workflow under construction: steps over one typed input, with loops, fan-out and conditions.

    Inputs are found by type among the graph's input, the step's ancestors and, inside a loop, the previous
    round; where two steps fit, `inputs` must name one. Nothing is checked against the rest of the graph until
    `build`, so steps may name later ones by string.

    >>> from pydantic import BaseModel
    >>> from metier.agents import Role
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> class Answer(BaseModel):
    ...     value: int
    >>> class Verdict(BaseModel):
    ...     correct: bool
    >>> solver = Role("solver", takes=(Puzzle, Verdict | None), gives=Answer)
    >>> critic = Role("critic", takes=(Puzzle, Answer), gives=Verdict)
    >>> graph = TaskGraph("solve-and-check", takes=Puzzle, gives=Answer)
    >>> with graph.loop("attempt", max_rounds=3, until=lambda s: s[check].correct):
    ...     solve = graph.step(solver)
    ...     check = graph.step(critic, after=solve)
    >>> graph.build().name
    'solve-and-check'
    """

    def __init__(self, name: str, *, takes: type[BaseModel], gives: Any) -> None:
        super().__init__(name, takes=takes, gives=gives)
        self._open: list[tuple[str, list[Draft]]] = []
        self._built: BuiltGraph | None = None
        self._written_in = sys._getframe(1).f_globals

    @property
    def input(self) -> InputRef:
        """The graph's own input, for `inputs`, `over` and conditions; `graph.input.field("texts")` is a field of it."""
        return InputRef(self.takes, self.name)

    def step(
        self,
        work: Role | Callable[..., Any] | TaskGraph,
        *,
        name: str | None = None,
        after: Reference | Sequence[Reference] = (),
        inputs: Mapping[str, Reference | tuple[Reference, ...]] | None = None,
        when: Condition | None = None,
        timeout_s: float | None = None,
        retries: int = 1,
    ) -> StepRef:
        """Add a role, a Python function or a whole graph as one step.

        `after` names the steps it waits for (their outputs, and those of their own ancestors, become
        available). `inputs` pins an input to a step, a field of one, or `graph.input`; a tuple of steps means the
        first of them that ran.
        `when` decides from the outputs so far whether it runs at all. A failing step is tried `retries` more
        times, each try within `timeout_s` seconds. A function runs at least once, not exactly once: a process that is
        killed after the call and before it is recorded calls it again when the run is resumed.
        """
        return self._add(
            Draft(
                name or _default_name(work), work, _as_tuple(after), dict(inputs or {}), when,
                timeout_s=timeout_s, retries=retries,
            )
        )  # fmt: skip

    def map(
        self,
        work: Role | Callable[..., Any] | TaskGraph,
        *,
        over: Reference,
        name: str | None = None,
        after: Reference | Sequence[Reference] = (),
        inputs: Mapping[str, Reference | tuple[Reference, ...]] | None = None,
        when: Condition | None = None,
        timeout_s: float | None = None,
        retries: int = 1,
        at_once: int = ITEMS_AT_ONCE,
        on_error: Any = "fail",
    ) -> StepRef:
        """Run a role, function or graph once for each item of a list, at the same time; gives the list of answers.

        `over` is a step that gives a list, or a list field of one or of the input (`plan.field("parts")`,
        `graph.input.field("texts")`, as text `"input.texts"`).
        At most `at_once` items run at the same time. When one fails after its retries, the run fails; with
        `on_error="skip"` the list is one shorter, and any other `on_error` is the value that stands for the item.
        What stops the whole run (its limits, an engine that is gone) is no fault of an item.
        """
        return self._add(
            Draft(
                name or _default_name(work), work, _as_tuple(after), dict(inputs or {}), when, over,
                timeout_s=timeout_s, retries=retries, items=ItemRules(at_once, on_error),
            )
        )  # fmt: skip

    def ask_person(
        self,
        name: str,
        *,
        takes: Any = (),
        gives: type[BaseModel],
        question: str,
        after: Reference | Sequence[Reference] = (),
        inputs: Mapping[str, Reference | tuple[Reference, ...]] | None = None,
        when: Condition | None = None,
    ) -> StepRef:
        """Stop for a person: the run is kept on disk until `resume` brings an answer of type `gives`.

        `question` is a Jinja template over the inputs, like a role's instructions.
        """
        Role(name, takes=takes, gives=gives, instructions=question)  # the same checks as a role's
        person = PersonDraft(takes, gives, question)
        return self._add(Draft(name, person, _as_tuple(after), dict(inputs or {}), when, retries=0))

    @contextmanager
    def loop(
        self,
        name: str,
        *,
        max_rounds: int | None = None,
        until: Condition | None = None,
        after: Reference | Sequence[Reference] = (),
        when: Condition | None = None,
        on_limit: Literal["continue", "fail"] = "continue",
    ) -> Iterator[StepRef]:
        """Repeat the steps written inside the `with` block until a condition holds, at most `max_rounds` times.

        Steps see the previous round's outputs where they take them. After the last round the run goes on with
        what there is, or fails with LoopLimitError when `on_limit="fail"`. Later steps see the last round.
        """
        if max_rounds is None or not 1 <= max_rounds <= MAX_ROUNDS_LIMIT:
            raise GraphError(
                f"loop {name!r} has max_rounds={max_rounds}",
                expected=f"1 to {MAX_ROUNDS_LIMIT}",
                remedy="Give every loop a limit: graph.loop(…, max_rounds=3).",
            )
        loop = LoopDraft(max_rounds, until, on_limit)
        ref = self._add(Draft(name, loop, _as_tuple(after), {}, when, retries=0))
        self._open.append((name, loop.body))
        try:
            yield ref
        finally:
            self._open.pop()

    def returns(self, *references: Reference) -> None:
        """Name the step whose output is the graph's; several mean the first of them that ran."""
        self.output = references
        self._built = None

    def build(self) -> BuiltGraph:
        """Check everything and freeze the workflow.

        Raises: GraphError for unknown names, types that do not match along an edge, two steps that fit one
        input, a cycle outside a loop, an empty loop, a step the input does not reach.
        """
        if self._built is None:
            self._built = build_graph(self)
        return self._built

    def reference(self) -> str:
        """`file.py:name`, by which the command line finds this graph; "" where it cannot.

        That needs a file that holds the graph under a name, and that starts nothing when it is loaded: a program needs
        its `if __name__ == "__main__":`.
        """
        file = self._written_in.get("__file__")
        name = next((name for name, value in list(self._written_in.items()) if value is self), None)
        if name is None or not isinstance(file, str) or not file.endswith(".py"):
            return ""
        try:
            guarded = self._written_in.get("__name__") != "__main__" or "__main__" in Path(file).read_text("utf-8")
        except (OSError, ValueError):
            return ""
        return f"{Path(file).resolve()}:{name}" if guarded else ""

    def to_mermaid(self) -> str:
        """The workflow as Mermaid text."""
        return to_mermaid(self.build())

    def _repr_html_(self) -> str:
        """In a notebook: the picture, or why it cannot be built yet."""
        try:
            return graph_html(self.build())
        except GraphError as error:
            return f"<p>Workflow <b>{escape(self.name)}</b> cannot be built yet: {escape(str(error)[:MOST_ERROR])}</p>"

    def _add(self, draft: Draft) -> StepRef:
        self._built = None
        if draft.retries < 0 or (draft.timeout_s is not None and draft.timeout_s <= 0):
            raise GraphError(
                f"step {draft.name!r} has retries={draft.retries}, timeout_s={draft.timeout_s}",
                expected="retries >= 0 and timeout_s > 0",
            )
        if draft.items.at_once < 1:
            raise GraphError(f"step {draft.name!r} has at_once={draft.items.at_once}", expected="at least 1")
        if any(c in draft.name for c in RESERVED) or not draft.name:
            raise GraphError(f"step name {draft.name!r}", expected=f"a name without {' '.join(RESERVED)}")
        body = self._open[-1][1] if self._open else self.steps
        if any(other.name == draft.name for other in body):
            raise GraphError(
                f"graph {self.name!r} has two steps named {draft.name!r} on one level",
                expected="different names",
                remedy="Give one of them a name: graph.step(…, name=…).",
            )
        body.append(draft)
        path = (*(name for name, _ in self._open), draft.name)
        return StepRef(path, gives_of(draft), self.name)


def _as_tuple(after: Reference | Sequence[Reference]) -> tuple[Reference, ...]:
    return (after,) if isinstance(after, str | StepRef | InputRef | FieldRef) else tuple(after)


def _default_name(work: Role | Callable[..., Any] | TaskGraph) -> str:
    if isinstance(work, Role | TaskGraph):
        return work.name
    return getattr(work, "__name__", type(work).__name__).strip("<>")
