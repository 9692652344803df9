"""A run while it goes on, as a stream of its events."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import anyio

from ...agents.answers.partial_answer import NOTHING_YET, GrowingAnswer
from ...agents.graphs.nodes import BuiltGraph, RoleWork
from ...agents.graphs.step_paths import StepPath
from ...agents.recorded_values import load
from ..events import Event, Listeners

__all__ = ["watched"]

STREAM_TEXT_EVENTS = 10_000
"""Pieces of text a slow reader may fall behind; more are dropped, other events never."""

MAY_BE_DROPPED = ("text", "partial_answer")


@asynccontextmanager
async def watched(
    run_id: str, work: Callable[[], Awaitable[object]], listeners: Listeners, answers_of: BuiltGraph | None = None
) -> AsyncGenerator[AsyncIterator[Event]]:
    """Do the work of a run and yield its events; leaving the block early cancels the work.

    With `answers_of` the answers of this graph's roles are among them while they grow.
    """
    sender, receiver = anyio.create_memory_object_stream[Event](math.inf)
    answers = None if answers_of is None else _GrowingAnswers(answers_of)

    def listen(event: Event) -> None:
        if event.run_id != run_id:
            return
        for one in (event, *(answers.after(event) if answers is not None else ())):
            behind = sender.statistics().current_buffer_used >= STREAM_TEXT_EVENTS
            whole = one.data.get("whole", False)
            if whole or not (behind and one.kind in MAY_BE_DROPPED):
                sender.send_nowait(one)

    async def run() -> None:
        async with sender:
            await work()

    listeners.append(listen)
    try:
        async with receiver, anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            yield receiver
            tasks.cancel_scope.cancel()
    finally:
        listeners.remove(listen)


class _GrowingAnswers:
    """The answers of a run's roles, each from its text: several steps may be written at the same time."""

    def __init__(self, graph: BuiltGraph) -> None:
        self._graph = graph
        self._growing: dict[str, GrowingAnswer] = {}

    def after(self, event: Event) -> Iterator[Event]:
        """What an event adds to the answer of its step."""
        path = event.step_path
        if event.kind == "text":
            if path not in self._growing:
                self._growing[path] = GrowingAnswer(self._gives(path))
            value = self._growing[path].add(event.data["text"])
            if value is not NOTHING_YET:
                yield event.model_copy(update={"kind": "partial_answer", "data": {"answer": value, "whole": False}})
        elif event.kind in ("ask_finished", "ask_retried", "step_failed"):
            self._growing.pop(path, None)  # the next text of this step is that of another try
        elif event.kind == "step_finished" and event.role and event.data.get("output") is not None:
            value = load(event.data["output"], self._gives(path))
            yield event.model_copy(update={"kind": "partial_answer", "data": {"answer": value, "whole": True}})

    def _gives(self, path: str) -> object:
        work = self._graph.step_at(StepPath.parse(path)).work
        return work.role.gives if isinstance(work, RoleWork) else str
