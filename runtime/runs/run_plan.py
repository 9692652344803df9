"""One run: what it starts from, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ...agents.errors import MetierError
from ...agents.graphs.nodes import BuiltGraph
from ..settings.limits import RunLimits
from ..store.records import RunRecord

__all__ = ["RunPlan", "RunResult"]


@dataclass(frozen=True)
class RunPlan:
    """One run that is about to start or to be resumed."""

    graph: BuiltGraph
    record: RunRecord
    """The run as it stands in the store."""

    value: BaseModel
    """The workflow's input."""

    limits: RunLimits

    score: Callable[[Any], float] | None = None
    """Quality of an output, of None for a run that failed; None where runs are not scored."""

    resumed: bool = False
    """Whether it goes on from recorded steps."""

    stream: bool = False
    """Whether its events carry text as it is generated."""

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.record.id


@dataclass(frozen=True)
class RunResult:
    """How one run of a batch ended; `error` says why when there is no output."""

    run_id: str
    output: Any = None
    error: MetierError | None = None
    score: float | None = None

    def __str__(self) -> str:
        """The output, or why there is none."""
        if self.error is None:
            return str(self.output)
        return f"run {self.run_id} has no output: {type(self.error).__name__}: {self.error}"
