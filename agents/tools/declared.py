"""The tools that a role is declared with: functions made to tools, two of one name refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..content_hash import content_hash
from ..errors import GraphError
from .mcp_server import McpServer
from .tool import Tool, tool

__all__ = ["DeclaredTool", "check_names", "declared_tools", "describe_declared"]

DeclaredTool = Tool | McpServer | Callable[..., Any]
"""What `Role(tools=[…])` takes."""


def declared_tools(tools: Iterable[DeclaredTool], owner: str) -> tuple[Tool | McpServer, ...]:
    """Tools as they were declared, functions made to tools; raises GraphError naming `owner` for what is none."""
    if isinstance(tools, str) or not isinstance(tools, Iterable):
        raise GraphError(f"{owner} has tools={tools!r}", expected="a list of functions, tools and MCP servers")
    found: list[Tool | McpServer] = []
    for each in tools:
        if not isinstance(each, Tool | McpServer) and not callable(each):
            raise GraphError(
                f"{owner} has the tool {each!r}",
                expected="a typed function, a Tool, or mcp_tools(…)",
                remedy="Wrap a command in mcp_tools('command …') if it is an MCP server, else in a function.",
            )
        found.append(each if isinstance(each, Tool | McpServer) else tool(each))
    check_names((each.name for each in found if isinstance(each, Tool)), owner)
    return tuple(found)


def check_names(names: Iterable[str], owner: str) -> None:
    """Raise GraphError when two tools of a role have one name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise GraphError(
                f"{owner} has two tools named {name!r}",
                expected="different names",
                remedy="Name one of them: tool(function, name='…'); narrow an MCP server: mcp_tools(…, names=[…]).",
            )
        seen.add(name)


def describe_declared(tools: Iterable[Tool | McpServer]) -> str:
    """What of a role's tools a resumed run must find unchanged."""
    return content_hash(
        [
            [each.name, each.description, each.parameters] if isinstance(each, Tool) else [each.address, each.names]
            for each in tools
        ]
    )
