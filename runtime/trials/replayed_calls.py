"""Calls of tools in a probe: one that equals an earlier one gets its result from a journal, and is not made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...agents.tools.tool import Tool
from ...router.probing.journal import Journal, record_key
from ..settings.tools import ToolSettings
from ..tools.calling import CallResult, ToolCaller

__all__ = ["RecordedCall", "ReplayedCalls"]


class RecordedCall(BaseModel):
    """A result by the content of its call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Hash of the tool (its name and its arguments' schema) and of the arguments."""
    tool: str
    """Name of the tool."""
    result: str
    """What it gave."""


class ReplayedCalls(ToolCaller):
    """Makes each call once, whatever number of candidates want it; calls that failed are made again.

    Tools with `replay=False` are called each time: those that change the world, or read what changes.
    """

    def __init__(self, settings: ToolSettings, journal: Journal[RecordedCall]) -> None:
        super().__init__(settings)
        self._journal = journal

    async def call(self, called: Tool, arguments: Mapping[str, Any]) -> CallResult:
        """See `ToolCaller.call`."""
        if not called.replay:
            return await super().call(called, arguments)
        key = record_key(tool=called.name, parameters=called.parameters, arguments=arguments)
        known = self._journal.get(key)
        if known is not None:
            return CallResult(known.result)
        result = await super().call(called, arguments)
        if not result.failed:
            self._journal.add(RecordedCall(key=key, tool=called.name, result=result.text))
        return result
