"""One run: what it starts from, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from pydantic import BaseModel

from ...agents.errors import MetierError
from ...agents.graphs.nodes import BuiltGraph
from ...agents.tasksets import Task, TaskSet
from ..settings.limits import RunLimits
from ..store.records import RunRecord

__all__ = ["RunPlan", "RunResult", "scored_by"]

MOST_SHOWN = 4_000
"""Characters of an output or an error that a notebook shows."""


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

    def _repr_html_(self) -> str:
        """In a notebook: a table of two columns, each text as it is and cut to `MOST_SHOWN` characters."""
        output = self.output.model_dump_json(indent=2) if isinstance(self.output, BaseModel) else repr(self.output)
        said = {"run": self.run_id, "output": output if self.error is None else None, "error": self.error}
        said["score"] = None if self.score is None else f"{self.score:.3f}"
        rows = (
            f"<tr><th>{name}</th><td><pre>{escape(str(value)[:MOST_SHOWN])}</pre></td></tr>"
            for name, value in said.items()
            if value is not None
        )
        return f"<table>{''.join(rows)}</table>"


def scored_by(tasks: TaskSet | None, task: Task) -> Callable[[Any], float] | None:
    """How a run of this task is scored; None where nothing scores it."""
    return None if tasks is None else partial(tasks.score, task)
