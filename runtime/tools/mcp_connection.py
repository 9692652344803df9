"""Connections to MCP servers: opened at the first use, opened again when they break, closed with the session.

They live in an event loop of their own, in one thread: a server that floods us costs its callers time, never the runs.
Calls come from worker threads, which wait here.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread
from anyio.abc import TaskStatus
from anyio.from_thread import BlockingPortal, start_blocking_portal

from ...agents.errors import ToolError, first_error
from ...agents.tools.mcp_server import McpServer
from ...agents.tools.tool import Tool, first_paragraph
from ..closing import AsyncClosing
from ..settings.tools import ToolSettings
from .mcp_stdio import ServerProcess, open_stdio

if TYPE_CHECKING:
    from mcp import Client

__all__ = ["McpConnections"]

LISTED_PAGES = 100
"""Pages of a server's list of tools that are read."""


@dataclass(frozen=True)
class _Connected:
    """A server that answers, until `stop` is set or its process ends."""

    client: Client
    tools: tuple[Any, ...]
    stop: anyio.Event
    process: ServerProcess


class _Connection:
    """The connection to one server; all of it is called from worker threads."""

    def __init__(self, server: McpServer, settings: ToolSettings, portal: BlockingPortal) -> None:
        self._server = server
        self._settings = settings
        self._portal = portal
        self._lock = threading.Lock()
        self._now: _Connected | None = None
        self._task: Future[None] | None = None
        self._opened = 0

    def tools(self) -> tuple[Tool, ...]:
        """The tools that the role has of this server; raises ToolError as `connect`."""
        return tuple(
            Tool(
                listed.name,
                first_paragraph(listed.description or ""),
                listed.input_schema,
                partial(self._call, listed.name),
                timeout_s=self._server.timeout_s,
                repeat=self._server.repeat,
                replay=self._server.replay,
            )
            for listed in self._connect().tools
        )

    def close(self) -> None:
        """Close the connection and wait until the server is gone."""
        with self._lock:
            self._drop()

    def _call(self, name: str, **arguments: Any) -> str:
        now = self._connect()
        return self._portal.call(partial(self._call_in_loop, now, name, arguments))

    async def _call_in_loop(self, now: _Connected, name: str, arguments: Mapping[str, Any]) -> str:
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        try:
            with anyio.fail_after(self._server.timeout_s):
                result = await now.client.call_tool(name, dict(arguments))
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                now.process.ended = True
                raise self._broken(now.process.problem or "the connection broke", now.process) from error
            raise ToolError(str(error)) from error
        text = _text_of(result)
        if result.is_error:
            raise ToolError(text or "the tool failed without a word")
        return text

    def _connect(self) -> _Connected:
        """The connection as it is, or a new one."""
        with self._lock:
            if self._now is not None and not self._now.process.ended:
                return self._now
            if self._opened > self._settings.mcp_restarts:
                raise self._broken(
                    f"it broke {self._opened} times", self._now.process if self._now else ServerProcess()
                )
            self._drop()
            self._opened += 1
            process = ServerProcess()
            try:
                self._task, self._now = self._portal.start_task(partial(self._hold, process))
            except ToolError:
                raise
            except BaseExceptionGroup as group:
                raise self._broken(process.problem or _said(first_error(group)), process) from group
            except TimeoutError as error:
                waited = f"did not list its tools within mcp_start_timeout_s={self._settings.mcp_start_timeout_s:g}"
                raise self._broken(waited, process) from error
            except Exception as error:
                raise self._broken(process.problem or _said(error), process) from error
            return self._now

    def _drop(self) -> None:
        if self._now is not None:
            self._portal.call(self._now.stop.set)
        if self._task is not None:
            with suppress(Exception):  # whatever it ended with, it has ended
                self._task.result()
        self._now = self._task = None

    async def _hold(self, process: ServerProcess, *, task_status: TaskStatus[_Connected]) -> None:
        """Keep the connection open, in the loop of the connections, until it is dropped."""
        with anyio.fail_after(self._settings.mcp_start_timeout_s) as starting:
            async with self._open(process) as client:
                connected = _Connected(client, await self._list(client), anyio.Event(), process)
                starting.deadline = math.inf
                task_status.started(connected)
                await connected.stop.wait()

    @asynccontextmanager
    async def _open(self, process: ServerProcess) -> AsyncGenerator[Client]:
        try:
            from mcp import Client
        except ModuleNotFoundError as error:
            raise ToolError(
                f"MCP server {self._server.address!r} needs {error.name}, which is not installed",
                expected="the mcp package",
                remedy="Install the extra: pip install 'metier[tools]'.",
            ) from error
        command, most = self._server.command, self._settings.mcp_max_message_mib << 20
        at: Any
        if command is None:
            from .mcp_http import open_http

            at = open_http(self._server.address, most)
        else:
            at = open_stdio(command, self._server.pass_env, process, most)
        async with Client(at) as client:
            yield client

    async def _list(self, client: Client) -> tuple[Any, ...]:
        listed: dict[str, Any] = {}
        cursor: str | None = None
        for _ in range(LISTED_PAGES):
            page = await client.list_tools(cursor=cursor)
            listed |= {each.name: each for each in page.tools}
            cursor = page.next_cursor
            if cursor is None:
                break
        names = self._server.names
        missing = [name for name in names or () if name not in listed]
        if missing:
            raise ToolError(
                f"MCP server {self._server.address!r} has no tool {', '.join(map(repr, missing))}",
                expected=f"some of {', '.join(list(listed)[:20]) or 'none: it lists no tools'}",
                remedy="Correct the names given to mcp_tools.",
            )
        kept = tuple(listed.values()) if names is None else tuple(listed[name] for name in names)
        if len(kept) > self._settings.mcp_max_tools:
            raise ToolError(
                f"MCP server {self._server.address!r} lists {len(kept)} tools",
                expected=f"at most mcp_max_tools={self._settings.mcp_max_tools}",
                remedy="Narrow them: mcp_tools('…', names=[…]), or raise tools.mcp_max_tools.",
            )
        return kept

    def _broken(self, why: str, process: ServerProcess) -> ToolError:
        words = process.last_words
        return ToolError(
            f"MCP server {self._server.address!r} cannot be used: {why}" + (f"; it said: {words}" if words else ""),
            expected="a server that speaks MCP",
            remedy="Start it by hand to see what it says.",
        )


class McpConnections(AsyncClosing):
    """The MCP servers of a session, by what the workflow says of them."""

    def __init__(self, settings: ToolSettings) -> None:
        self._settings = settings
        self._connections: dict[McpServer, _Connection] = {}
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._thread: AbstractContextManager[BlockingPortal] | None = None
        self._closed = False

    async def tools_of(self, server: McpServer) -> tuple[Tool, ...]:
        """The tools of a server, which is connected to when it is not yet.

        Raises: ToolError when it cannot be started or reached, or does not have the tools that are named.
        """
        return await to_thread.run_sync(lambda: self._of(server).tools(), abandon_on_cancel=True)

    async def close(self) -> None:
        """See `AsyncClosing.close`."""
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self._close)

    def _of(self, server: McpServer) -> _Connection:
        with self._lock:
            if self._closed:
                raise ToolError(f"MCP server {server.address!r} is asked after the session was closed")
            if self._portal is None:
                self._thread = start_blocking_portal("asyncio")
                self._portal = self._thread.__enter__()
            if server not in self._connections:
                self._connections[server] = _Connection(server, self._settings, self._portal)
            return self._connections[server]

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            thread, self._thread, self._portal = self._thread, None, None
            connections, self._connections = self._connections, {}
        if thread is not None:
            for connection in connections.values():
                connection.close()
            thread.__exit__(None, None, None)


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _text_of(result: Any) -> str:
    """What a server gave, as text: other contents are named, not shown."""
    parts = [part.text if part.type == "text" else f"[{part.type}, not shown]" for part in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)
