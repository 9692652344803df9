"""A run while it goes on, as a stream of its events."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from ..events import Event, Listeners

__all__ = ["watched"]

STREAM_TEXT_EVENTS = 10_000
"""Pieces of text a slow reader may fall behind; more are dropped, other events never."""


@asynccontextmanager
async def watched(
    run_id: str, work: Callable[[], Awaitable[object]], listeners: Listeners
) -> AsyncGenerator[AsyncIterator[Event]]:
    """Do the work of a run and yield its events; leaving the block early cancels the work."""
    sender, receiver = anyio.create_memory_object_stream[Event](math.inf)

    def listen(event: Event) -> None:
        behind = sender.statistics().current_buffer_used >= STREAM_TEXT_EVENTS
        if event.run_id == run_id and not (behind and event.kind == "text"):
            sender.send_nowait(event)

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
