"""Runs as they travel: what starts one, and how one is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...agents.graphs.nodes import (
    BuiltBody,
    BuiltGraph,
    BuiltNode,
    FunctionWork,
    GraphWork,
    LoopWork,
    PersonWork,
    RoleWork,
)
from ...agents.graphs.step_paths import ROOT, StepPath
from ..settings.limits import RunLimits
from ..store.records import RunRecord
from ..store.store import RunStore
from .chat.sampling_requests import MAX_SEED

__all__ = ["NewRun", "ResumeAnswers", "graph_tree", "run_row", "run_steps", "workflow_of"]


class NewRun(BaseModel):
    """A run to start: a workflow's name and its input, as JSON data or as text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workflow: str = Field(max_length=200)
    """Name of a workflow that the server serves."""
    input: dict[str, Any] | str
    """The input as JSON data, or as text."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of sampling."""
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_SEED)
    """Most tokens of the run. Without it the server's settings hold."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Longest time of the run in seconds. Without it the server's settings hold."""

    def limits(self) -> RunLimits:
        """What the run may use, as far as the client says it."""
        return RunLimits(max_tokens=self.max_tokens, max_seconds_s=self.max_seconds)


class ResumeAnswers(BaseModel):
    """Answers for the steps at which a run waits for a person, by step path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    answers: dict[str, Any] = {}
    """Step path → answer, of the type that the step asks for."""


def run_row(run: RunRecord, *, live: bool) -> dict[str, Any]:
    """A run as JSON. `live` says whether it goes on in this server; one that only says so was killed."""
    return {
        "id": run.id,
        "object": "metier.run",
        "workflow": workflow_of(run.batch),
        "state": "killed" if run.state == "running" and not live else run.state,
        "input": _finite(run.input),
        "output": None if run.output is None else _finite(run.output),
        "error": run.error,
        "score": run.score,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "busy_s": run.busy_s,
    }


def workflow_of(batch: str) -> str:
    """The workflow of a batch, which is named after its graph, day, time and four letters."""
    return batch.rsplit("-", 3)[0]


def _finite(recorded: str) -> Any:
    """Recorded JSON with null for NaN and infinity, which HTTP clients cannot read."""
    return json.loads(recorded, parse_constant=lambda name: None)


def run_steps(store: RunStore, run_id: str) -> dict[str, Any]:
    """The recorded steps of a run in the order they ended, and the questions it waits with."""
    rows = store.query(
        "SELECT path, role, tool, state, output, error, tries, started_at, "
        "max(started_at, finished_at) AS finished_at FROM steps WHERE run = ? ORDER BY steps.finished_at",
        run_id,
    )
    steps = [dict(row) | {"output": None if row["output"] is None else json.loads(row["output"])} for row in rows]
    asked = store.questions(run_id)
    return {"steps": steps, "questions": {path: text for path, (text, answer) in asked.items() if answer is None}}


def graph_tree(graph: BuiltGraph) -> dict[str, Any]:
    """A workflow's steps for drawing: ranks of nodes, loops and sub-graphs with ranks of their own."""
    return {"name": graph.name, "takes": graph.takes.__name__, "ranks": _ranks(graph.body, ROOT)}


def _ranks(body: BuiltBody, around: StepPath) -> list[list[dict[str, Any]]]:
    rank: dict[str, int] = {}
    ranks: list[list[dict[str, Any]]] = []
    for node in body.nodes:  # in an order that respects the edges
        rank[node.name] = at = max((rank[before] + 1 for before in node.after), default=0)
        while len(ranks) <= at:
            ranks.append([])
        ranks[at].append(_node(node, around / node.name))
    return ranks


def _node(node: BuiltNode, path: StepPath) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": node.name, "path": str(path), "after": list(node.after), "each": node.each}
    shown["conditional"] = node.when is not None
    inner: Mapping[str, Any]
    match node.work:
        case RoleWork(role):
            inner = {"kind": "role", "role": role.name}
        case FunctionWork():
            inner = {"kind": "function"}
        case PersonWork():
            inner = {"kind": "person"}
        case LoopWork() as loop:
            inner = {"kind": "loop", "rounds": loop.max_rounds, "ranks": _ranks(loop.body, path)}
        case GraphWork(graph):
            inner = {"kind": "graph", "ranks": _ranks(graph.body, path)}
    return shown | dict(inner)
