"""Run a built graph on one input: ready steps start at once, loops count rounds, a failure cancels siblings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from ...agents.errors import (
    AnswerError,
    AskRejectedError,
    GraphError,
    LoopLimitError,
    NotFiniteError,
    StepError,
    StepTimeoutError,
    first_error,
)
from ...agents.graphs.drafts import InputRef, StepRef
from ...agents.graphs.nodes import (
    Alternatives,
    BuiltBody,
    BuiltGraph,
    BuiltNode,
    Condition,
    EarlierRounds,
    GraphInput,
    GraphInputField,
    GraphWork,
    LoopWork,
    PersonWork,
    PreviousRound,
    Source,
    StepOutput,
)
from ...agents.graphs.step_paths import ROOT, StepPath
from ...router.escalation import NO_FAILURES, Failures
from .foresight import RunForesight
from .steps import StepRunner
from .tool_loop import BLOCKED

__all__ = ["Executor"]

ItemErrors = AnswerError | StepError | StepTimeoutError | LoopLimitError | AskRejectedError | NotFiniteError
"""What is the fault of the item of a fan-out that met it, not of the run or its engine."""

GIVEN_UP: Final = object()
"""Stands for an item that failed and is left out."""


@dataclass
class Scope:
    """The outputs of one body while it runs (of one round, in a loop), and the scope around it.

    `names` is what `StepRef` calls the body, `path` where it is in the run. A step that was
    skipped has output None; a loop's output is the dict of its last round. `earlier` are the outputs of the loop's
    earlier rounds. `failures` counts the rounds of the loop
    that its condition did not accept; a sub-graph has those of its step.
    """

    graph: str
    value: Any
    names: tuple[str, ...] = ()
    path: StepPath = ROOT
    round: int = 1
    outer: Scope | None = None
    earlier: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    blocked: bool = False
    failures: Failures = NO_FAILURES


class Outputs:
    """What conditions read: `s[check]` is the step's output in the current round, None when it was skipped.

    `read` keeps the names of the steps that were looked at.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.read: dict[str, None] = {}

    def __getitem__(self, step: StepRef | InputRef) -> Any:
        scope: Scope | None = self._scope
        if isinstance(step, InputRef):
            if step.graph == self._scope.graph:
                return self._scope.value
            raise GraphError(
                f"a condition of graph {self._scope.graph!r} reads the input of graph {step.graph!r}",
                expected="the input of its own graph",
            )
        self.read[step.name] = None
        while scope is not None:
            depth = len(scope.names)
            if step.graph == scope.graph and step.path[:depth] == scope.names and step.path[depth] in scope.outputs:
                return _descend(scope.outputs, step.path[depth:])
            scope = scope.outer
        raise GraphError(
            f"a condition reads step {'/'.join(step.path)!r}, which has not run yet",
            expected="a step that comes before, or a step of the loop's body in `until`",
            remedy="Add after=… to the step that has the condition.",
        )


class Executor:
    """Walks one run of a graph; the steps themselves are done by a StepRunner.

    With `foresight`, the backend is told at every step what may come next, and loads adapters beside the run.
    """

    def __init__(self, steps: StepRunner, foresight: RunForesight | None = None) -> None:
        self._steps = steps
        self._foresight = foresight
        self._beside: TaskGroup | None = None

    async def run(self, graph: BuiltGraph, value: Any) -> Any:
        """Run the graph on one input; returns its output, or BLOCKED when it waits for a person.

        Raises: RunError or EngineError of the first step that failed, after its siblings were cancelled.
        """
        scope = Scope(graph.name, value)
        if self._foresight is None:
            await self._run_body(graph.body, scope)
        else:
            try:
                async with anyio.create_task_group() as self._beside:
                    await self._run_body(graph.body, scope)
                    self._beside.cancel_scope.cancel()  # prefetches that have not started are cancelled
            finally:
                self._foresight.close()
        return BLOCKED if scope.blocked else _read(graph.output, scope)

    async def _run_body(self, body: BuiltBody, scope: Scope) -> None:
        waiting = {node.name: len(node.after) for node in body.nodes}

        async def run_chain(node: BuiltNode) -> None:
            """Run a node, then those that became ready: the first in this task, the others in tasks of their own."""
            following: BuiltNode | None = node
            while following is not None:
                done, following = following, None
                output = await self._run_node(done, scope)
                if output is BLOCKED:
                    scope.blocked = True
                    return
                scope.outputs[done.name] = output
                for follower in body.followers[done.name]:
                    waiting[follower.name] -= 1
                    if waiting[follower.name]:
                        continue
                    if following is None:
                        following = follower
                    else:
                        tasks.start_soon(run_chain, follower)

        ready = [node for node in body.nodes if not node.after]
        async with anyio.create_task_group() as tasks:
            for node in ready[1:]:
                tasks.start_soon(run_chain, node)
            await run_chain(ready[0])

    async def _run_node(self, node: BuiltNode, scope: Scope) -> Any:
        path = scope.path / node.name
        if node.when is not None and not _holds(node.when, Outputs(scope), node.name):
            self._steps.skip(str(path), "its condition does not hold")
            return None
        if isinstance(node.work, LoopWork):
            return await self._run_loop(node, node.work, scope, path)
        inputs = {name: _read(source, scope) for name, source in node.sources.items()}
        missing = [n for n, wanted in node.inputs.items() if inputs.get(n) is None and not wanted.optional]
        if missing:
            self._steps.skip(str(path), f"its input {missing[0]!r} was skipped")
            return None
        if self._foresight is None or isinstance(node.work, GraphWork):
            return await self._run_work(node, inputs, scope, path)
        began = str(path)
        prefetch = self._foresight.step_began(began)
        if prefetch is not None:
            assert self._beside is not None
            self._beside.start_soon(prefetch)
        try:
            return await self._run_work(node, inputs, scope, path)
        finally:
            self._foresight.step_ended(began)

    async def _run_work(self, node: BuiltNode, inputs: dict[str, Any], scope: Scope, path: StepPath) -> Any:
        if node.each is not None:
            return await self._fan_out(node, inputs, scope, path)
        return await self._run_once(node, inputs, scope, path)

    async def _run_once(self, node: BuiltNode, inputs: dict[str, Any], scope: Scope, path: StepPath) -> Any:
        if isinstance(node.work, GraphWork):
            graph = node.work.graph
            inner = Scope(graph.name, next(iter(inputs.values())), path=path, failures=scope.failures)
            await self._run_body(graph.body, inner)
            return BLOCKED if inner.blocked else _read(graph.output, inner)
        if isinstance(node.work, PersonWork):
            return self._steps.ask_person(node, node.work, str(path), inputs)
        return await self._steps.run(node, str(path), inputs, scope.round, scope.failures)

    async def _fan_out(self, node: BuiltNode, inputs: dict[str, Any], scope: Scope, path: StepPath) -> Any:
        each = node.each
        assert each is not None
        items = inputs[each]
        answers: list[Any] = [None] * len(items)
        waiting = iter(enumerate(items))

        async def work() -> None:
            for index, item in waiting:
                answers[index] = await self._run_item(node, {**inputs, each: item}, scope, path.at_item(index))

        async with anyio.create_task_group() as tasks:
            for _ in range(min(len(items), node.items.at_once)):
                tasks.start_soon(work)
        if any(answer is BLOCKED for answer in answers):
            return BLOCKED
        return [answer for answer in answers if answer is not GIVEN_UP]

    async def _run_item(self, node: BuiltNode, inputs: dict[str, Any], scope: Scope, path: StepPath) -> Any:
        """One item of a fan-out; of one that failed what stands for it, where the workflow says that it may fail."""
        rules = node.items
        if not rules.survive:
            return await self._run_once(node, inputs, scope, path)
        if not self._steps.was_given_up(str(path)):
            try:
                return await self._run_once(node, inputs, scope, path)
            except Exception as error:
                group = error if isinstance(error, ExceptionGroup) else ExceptionGroup("", [error])
                if group.subgroup(lambda one: not isinstance(one, ItemErrors | ExceptionGroup)) is not None:
                    raise
                self._steps.give_up(str(path), first_error(group))
        return GIVEN_UP if rules.skip else rules.on_error

    async def _run_loop(self, node: BuiltNode, loop: LoopWork, scope: Scope, path: StepPath) -> Any:
        earlier: list[dict[str, Any]] = []
        failures = NO_FAILURES
        for number in range(1, loop.max_rounds + 1):
            round_path = path.in_round(number)
            self._steps.begin_round(str(round_path), loop.max_rounds)
            inner = Scope(
                scope.graph, scope.value, (*scope.names, node.name), round_path, number, scope, earlier,
                failures=failures,
            )  # fmt: skip
            await self._run_body(loop.body, inner)
            if inner.blocked:
                return BLOCKED
            earlier.append(inner.outputs)
            if loop.until is not None:
                outputs = Outputs(inner)
                if _holds(loop.until, outputs, node.name):
                    return inner.outputs
                failures = Failures(rejected=number, rejected_by=", ".join(outputs.read))
        if loop.until is not None and loop.on_limit == "fail":
            raise LoopLimitError(
                f"loop {str(path)!r} was not satisfied after {loop.max_rounds} rounds",
                expected="its `until` condition to hold",
                remedy="Raise max_rounds, or use on_limit='continue' to go on with the last round.",
            )
        return earlier[-1]


def _holds(condition: Condition, outputs: Outputs, name: str) -> bool:
    try:
        return bool(condition(outputs))
    except GraphError:
        raise
    except Exception as error:
        raise GraphError(
            f"the condition of {name!r} raised {type(error).__name__}: {error}",
            expected="a function of the outputs so far, such as lambda s: s[check].correct",
            remedy="Mind that a skipped step's output is None.",
        ) from error


def _read(source: Source, scope: Scope) -> Any:
    match source:
        case GraphInput():
            return scope.value
        case GraphInputField():
            return _field(scope.value, source.field)
        case StepOutput():
            at = _outwards(scope, source.hops)
            return _field(_descend(at.outputs, source.path), source.field)
        case PreviousRound():
            at = _outwards(scope, source.hops)
            if at.earlier:
                return _field(_descend(at.earlier[-1], source.path), source.field)
            return None if source.fallback is None else _read(source.fallback, scope)
        case EarlierRounds():
            rounds = _outwards(scope, source.hops).earlier
            given = (_field(_descend(outputs, source.path), source.field) for outputs in rounds)
            return [value for value in given if value is not None]
        case Alternatives():
            values = (_read(inner, scope) for inner in source.sources)
            return next((value for value in values if value is not None), None)


def _outwards(scope: Scope, hops: int) -> Scope:
    for _ in range(hops):
        assert scope.outer is not None
        scope = scope.outer
    return scope


def _descend(outputs: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = outputs
    for name in path:
        if value is None:
            return None
        value = value.get(name)
    return value


def _field(value: Any, field_name: str | None) -> Any:
    return value if field_name is None or value is None else getattr(value, field_name)
