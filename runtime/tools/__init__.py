"""Calls of tools: functions in this process, and MCP servers that a session is connected to."""
