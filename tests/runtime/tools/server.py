"""The MCP server of the tests, as a role declares it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from metier.agents import McpServer, mcp_tools

SCRIPT = Path(__file__).with_name("mcp_script.py")


def server(folder: Path, *ways: str, **options: Any) -> McpServer:
    """One that keeps its notes in `folder` and misbehaves in the given ways."""
    command = [sys.executable, "-S", str(SCRIPT), str(folder), *ways]
    return mcp_tools(shlex.join(command), **{"timeout_s": 20.0, **options})
