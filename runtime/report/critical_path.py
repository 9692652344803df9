"""How soon a run could have ended: its longest chain of steps that wait for each other, with nothing queueing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...agents.graphs.workflow_shape import StepShape
from .ledger import CallEntry, Ledger
from .step_order import step_order

__all__ = ["critical_path_s", "longest_chain_s", "under_way_s"]


def critical_path_s(ledger: Ledger) -> dict[str, float]:
    """Run → seconds of its critical path; empty for stores from before workflows were kept with their batches.

    A role's step counts with what its asks took in the engine one after the other (prefill and decode, corrections and
    retries too) and the time in which its tools were called, a function's with its wall time, a person's with nothing.
    That is the time this run would have taken with an engine that never let an ask wait, each ask as slow as it was in
    its batch.
    """
    if ledger.shape is None:
        return {}
    times: dict[str, dict[str, float]] = {run.id: {} for run in ledger.runs}
    for step in ledger.steps:
        if not step.role:
            times[step.run][step.path] = step.finished_at - step.started_at
    for ask in ledger.asks:
        times[ask.run][ask.path] = times[ask.run].get(ask.path, 0.0) + ask.service_s
    called: dict[tuple[str, str], list[CallEntry]] = {}
    for call in ledger.calls:
        called.setdefault((call.run, call.path), []).append(call)
    for (run, path), calls in called.items():
        times[run][path] = times[run].get(path, 0.0) + under_way_s(calls)
    return {run: longest_chain_s(ledger.shape.body, steps) for run, steps in times.items()}


def under_way_s(calls: Iterable[CallEntry]) -> float:
    """Seconds in which at least one of these calls of tools was under way."""
    total, until = 0.0, 0.0
    for call in sorted(calls, key=lambda one: one.started_at):
        end = call.started_at + call.seconds
        total += max(end - max(call.started_at, until), 0.0)
        until = max(until, end)
    return total


def longest_chain_s(body: Sequence[StepShape], times: Mapping[str, float]) -> float:
    """Longest path through a workflow's steps, weighted with the seconds of each step that ran, by path.

    Rounds follow each other; items of a fan-out run side by side; a step that did not run takes no time.
    """
    ends_s: dict[str, float] = {}
    for path, before in step_order(body, times).items():
        ends_s[path] = times[path] + max((ends_s[name] for name in before), default=0.0)
    return max(ends_s.values(), default=0.0)
