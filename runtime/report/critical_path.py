"""How soon a run could have ended: its longest chain of steps that wait for each other, with nothing queueing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...agents.graphs.workflow_shape import StepShape
from .ledger import Ledger
from .step_order import step_order

__all__ = ["critical_path_s", "longest_chain_s"]


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
    for (run, path), seconds in calling_s(ledger).items():
        times[run][path] = times[run].get(path, 0.0) + seconds
    return {run: longest_chain_s(ledger.shape.body, steps) for run, steps in times.items()}


def calling_s(ledger: Ledger) -> dict[tuple[str, str], float]:
    """(run, step) → seconds in which at least one of its calls of tools was under way."""
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for call in ledger.calls:
        spans.setdefault((call.run, call.path), []).append((call.started_at, call.started_at + call.seconds))
    return {step: _covered_s(sorted(found)) for step, found in spans.items()}


def _covered_s(spans: Sequence[tuple[float, float]]) -> float:
    total, until = 0.0, 0.0
    for start, end in spans:  # by their start
        total += max(end - max(start, until), 0.0)
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
