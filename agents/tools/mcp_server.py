"""An MCP server whose tools a role may call: where it is, and which of its tools count."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import GraphError
from .tool import DEFAULT_TIMEOUT_S

__all__ = ["McpServer", "mcp_tools"]


@dataclass(frozen=True)
class McpServer:
    """An MCP server by its command or its URL; a session connects at the first call, and closes with itself.

    `names` are the tools of it that the role has; None is all it lists. `pass_env` are environment variables that its
    command gets beside PATH, HOME and the like. The other fields are those of `Tool`, the same
    for all of its tools.
    """

    address: str
    names: tuple[str, ...] | None = None
    pass_env: tuple[str, ...] = ()
    timeout_s: float = DEFAULT_TIMEOUT_S
    repeat: bool = True
    replay: bool = True

    @property
    def command(self) -> list[str] | None:
        """The command's words; None where the address is a URL."""
        return None if self.address.startswith(("http://", "https://")) else shlex.split(self.address)


def mcp_tools(
    address: str,
    names: Iterable[str] | None = None,
    *,
    pass_env: Iterable[str] = (),
    timeout_s: float = DEFAULT_TIMEOUT_S,
    repeat: bool = True,
    replay: bool = True,
) -> McpServer:
    """The tools of an MCP server: `mcp_tools("uvx some-server --flag")` over stdio, `mcp_tools("https://…/mcp")` over
    streamable HTTP. Needs the extra `tools` (the `mcp` package) once a run calls them.

    `names` narrows them. A command gets no variable of our environment beside PATH, HOME and the like but those named
    in `pass_env`. A server has no say in `repeat`: pass False for tools that must not be called twice.
    Raises: GraphError for an address that is no command.

    >>> mcp_tools("python -m my_server", ["search"]).command
    ['python', '-m', 'my_server']
    """
    server = McpServer(address, None if names is None else tuple(names), tuple(pass_env), timeout_s, repeat, replay)
    try:
        words = server.command
    except ValueError as error:  # quotes that are not closed
        raise GraphError(f"{address!r} is no command: {error}", expected="a command line, or a URL") from error
    if words == []:
        raise GraphError("an MCP server has an empty address", expected="a command line, or a URL")
    if not timeout_s > 0:
        raise GraphError(f"mcp_tools has timeout_s={timeout_s}", expected="more than 0 seconds")
    return server
