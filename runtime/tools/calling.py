"""Makes the calls of a session's tools: in time, bounded, and with every failure as a result that a model can read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from anyio import CapacityLimiter

from ...agents.errors import ToolError
from ...agents.roles import Role
from ...agents.tools.declared import check_names
from ...agents.tools.tool import Tool, result_text
from ..closing import AsyncClosing
from ..settings.tools import ToolSettings
from ..worker_threads import run_in_thread
from .mcp_connection import McpConnections

__all__ = ["CallResult", "ToolCaller"]


@dataclass(frozen=True)
class CallResult:
    """What came of one call: the text that the model is told, and whether it is an error."""

    text: str
    failed: bool = False


class ToolCaller(AsyncClosing):
    """The tools of a session's roles, and the calls of them; closes the MCP servers that it connected to."""

    def __init__(self, settings: ToolSettings) -> None:
        self._settings = settings
        self._servers = McpConnections(settings)
        self._threads: CapacityLimiter | None = None

    async def close(self) -> None:
        """See `AsyncClosing.close`."""
        await self._servers.close()

    async def tools_of(self, role: Role) -> tuple[Tool, ...]:
        """A role's tools, those of MCP servers among them.

        Raises: ToolError when a server cannot be reached or does not have what was named, GraphError for two tools of
        one name.
        """
        found: list[Tool] = []
        for declared in role.tools:
            if isinstance(declared, Tool):
                found.append(declared)
            else:
                assert not callable(declared)  # the role made tools of functions
                found.extend(await self._servers.tools_of(declared))
        check_names((each.name for each in found), f"role {role.name!r}")
        return tuple(found)

    async def call(self, called: Tool, arguments: Mapping[str, Any]) -> CallResult:
        """Call a tool once; what goes wrong is the result, never an error, so that the model can try otherwise."""
        try:
            with anyio.fail_after(called.timeout_s):
                result = await self._run(called, called.read(arguments))
            return CallResult(self._cut(result_text(result)))
        except TimeoutError:
            return self._failed(f"no result within {called.timeout_s:g} s")
        except ToolError as error:
            return self._failed(error.problem)
        except Exception as error:  # a tool may raise anything, and its result may not be writable
            return self._failed(f"{type(error).__name__}: {error}")

    async def _run(self, called: Tool, arguments: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(called.function):
            return await called.function(**arguments)
        if self._threads is None:
            self._threads = CapacityLimiter(self._settings.threads)
        result = await run_in_thread(partial(called.function, **arguments), self._threads)
        return await result if inspect.isawaitable(result) else result

    def _failed(self, reason: str) -> CallResult:
        return CallResult(self._cut(f"error: {reason}"), failed=True)

    def _cut(self, text: str) -> str:
        most = self._settings.max_result_characters
        # Halves of surrogate pairs cannot be recorded or sent.
        text = text.encode("utf-8", "backslashreplace").decode() if len(text) <= most else text
        if len(text) <= most:
            return text
        kept = text[:most].encode("utf-8", "backslashreplace").decode()
        return f"{kept[:most]}… (the first {most} of {len(text)} characters)"
