"""Responses whose work ends with their client: a whole JSON object, or a stream of server-sent events."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..settings.server import ServerSettings
from .error_replies import error_body, error_response

__all__ = ["EventStream", "JsonWork", "Write", "sse"]

Write = Callable[[bytes], Awaitable[None]]
"""Sends bytes to the client; raises TimeoutError when it does not take them within `write_timeout_s`."""


Produce = Callable[[Write], Awaitable[None]]
"""Writes a stream, piece by piece, and returns when that was all."""


def sse(data: Any, *, event: str | None = None, id: int | None = None) -> bytes:
    """One server-sent event; `data` is text as it is, anything else JSON."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = ("" if id is None else f"id: {id}\n") + ("" if event is None else f"event: {event}\n")
    return f"{head}data: {text}\n\n".encode()


class JsonWork(Response):
    """Works out a JSON answer; a client that goes away cancels the work. Errors become error replies."""

    def __init__(self, work: Callable[[], Awaitable[tuple[int, Any]]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work, and answer unless the client has gone."""
        answer: Response | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_gone, receive, tasks.cancel_scope)
            try:
                status, body = await self._work()
                content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
                answer = Response(content, status, media_type="application/json")
            except Exception as error:
                answer = error_response(error)
            tasks.cancel_scope.cancel()
        if answer is not None:
            await answer(scope, receive, send)


class EventStream(Response):
    """Server-sent events written by `produce`, which a client that goes away, or never reads, cancels.

    An error before the first piece is an error reply of its own; one after it is the stream's last event. While there
    is nothing to say, a comment goes out every `keep_alive_s`.
    """

    def __init__(self, produce: Produce, settings: ServerSettings) -> None:
        super().__init__(media_type="text/event-stream")
        self._produce = produce
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream until it ends or the client no longer reads it."""
        lock, began, stuck, written = anyio.Lock(fast_acquire=True), False, False, False

        async def write(piece: bytes) -> None:
            nonlocal began, stuck
            async with lock:  # a keep-alive never stands in the middle of an event
                try:
                    with anyio.fail_after(self._settings.write_timeout_s):
                        if not began:
                            began = True
                            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                            headers += [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
                            await send({"type": "http.response.start", "status": 200, "headers": headers})
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                except TimeoutError:
                    stuck = True
                    raise

        async def keep_alive() -> None:
            while True:
                await anyio.sleep(self._settings.keep_alive_s)
                try:
                    await write(b": still here\n\n")
                except TimeoutError:
                    tasks.cancel_scope.cancel()

        failed: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_gone, receive, tasks.cancel_scope)
            tasks.start_soon(keep_alive)
            try:
                await self._produce(write)
                await write(b"")
                written = True
            except Exception as error:
                failed = error
            tasks.cancel_scope.cancel()
        if stuck or not (written or failed):
            return
        if failed is not None and not began:
            await error_response(failed)(scope, receive, send)
            return
        last = b"" if failed is None else sse(error_body(failed)[1])
        with anyio.move_on_after(self._settings.write_timeout_s):
            await send({"type": "http.response.body", "body": last, "more_body": False})


async def _cancel_when_gone(receive: Receive, work: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    work.cancel()
