"""What calls of tools may use."""

from __future__ import annotations

from pydantic import Field

from ...agents.frozen_model import FrozenModel
from ...agents.tools.tool import MOST_RESULT_CHARACTERS

__all__ = ["ToolSettings"]


class ToolSettings(FrozenModel):
    """What calls of tools may use.

    >>> ToolSettings(max_result_characters=500).threads
    16
    """

    max_result_characters: int = Field(default=MOST_RESULT_CHARACTERS, ge=100)
    """Characters of a tool's result, or of its error, that go to the model and are recorded. The rest is cut off."""

    threads: int = Field(default=16, ge=1)
    """Worker threads for tools that are not async. A call that timed out keeps its thread until it returns."""

    mcp_start_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds in which an MCP server has to start and list its tools."""

    mcp_restarts: int = Field(default=3, ge=0)
    """How often a session connects again to an MCP server whose connection broke."""

    mcp_max_tools: int = Field(default=64, ge=1)
    """Tools that an MCP server may list, after it was narrowed by name."""

    mcp_max_message_mib: int = Field(default=16, ge=1)
    """MiB of one message of an MCP server. A larger one disconnects a server behind pipes; over HTTP it is an error of
    what was asked."""
