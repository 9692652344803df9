"""An MCP server over HTTP, each of its messages bounded.

The `mcp` package bounds the events of a stream, and reads a response of plain JSON whole, whatever its length.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from mcp.client.streamable_http import streamable_http_client

__all__ = ["open_http"]

CONNECT_TIMEOUT_S = 30.0
"""Seconds for the connection, and for each piece that is sent."""

READ_TIMEOUT_S = 300.0
"""Seconds between two pieces of a response; a call ends after its own time-out."""


@asynccontextmanager
async def open_http(url: str, max_message_bytes: int) -> AsyncGenerator[Any]:
    """Yield the streams that `mcp.Client` talks to a server through.

    A message longer than `max_message_bytes` is an error of what was asked, and so is one that is compressed, since
    its length is not known.
    """
    client = httpx2.AsyncClient(
        transport=_Bounded(max_message_bytes),
        timeout=httpx2.Timeout(CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
        headers={"accept-encoding": "identity"},
    )
    async with client, streamable_http_client(url, http_client=client, max_sse_event_size=max_message_bytes) as streams:
        yield streams


class _Bounded(httpx2.AsyncHTTPTransport):
    """Ends responses that are no stream of events when they get too long."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            await response.aclose()
            raise httpx2.StreamError("its response is compressed, which was not asked for")
        if not response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _Counted(response.stream, self._max_bytes)
        return response


class _Counted(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = 0
        async for piece in self._stream:
            read += len(piece)
            if read > self._max_bytes:
                raise httpx2.StreamError(f"it sent a message of more than {self._max_bytes >> 20} MiB")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()
