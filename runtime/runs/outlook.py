"""The rest of a run: which variants it asks for next, and how long it still takes. Computed once for each graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from ...agents.backend import Backend, ForeseeingBackend
from ...agents.graphs.nodes import BuiltGraph
from ...router.route import Router
from ..settings.session import Settings
from .foresight import Foresight, RunForesight
from .run_plan import RunPlan
from .run_priority import AttainedService, RemainingPath, RunPriority

__all__ = ["Outlooks", "RunOutlook"]

GRAPHS_KEPT = 64
"""Graphs whose outlook is kept; a program that builds a new graph for every run must not grow."""


@dataclass(frozen=True)
class RunOutlook:
    """The rest of one run. `priority` is None where asks go in the order they come, `foresight` where the backend
    takes no announcements."""

    remaining: RemainingPath
    priority: RunPriority | None
    foresight: RunForesight | None


@dataclass(frozen=True)
class _GraphOutlook:
    graph: BuiltGraph  # kept, so that no other graph gets its id
    remaining: RemainingPath
    foresight: Foresight


class Outlooks:
    """The outlooks of a session's runs, which share the work for their graphs."""

    def __init__(self, backend: Backend, router: Router, settings: Settings) -> None:
        self._backend = backend
        self._router = router
        self._settings = settings
        # A backend with these two methods gets announcements (see ForeseeingBackend).
        self._foresees = settings.engine.foresight and hasattr(backend, "foresee") and hasattr(backend, "forget")
        self._graphs: dict[int, _GraphOutlook] = {}
        self._service = AttainedService()
        self._opened_s = time.monotonic()

    def of(self, plan: RunPlan, again: Callable[[], bool]) -> RunOutlook:
        """The outlook of a run that starts now; `again` says whether another run of its graph will follow."""
        of_graph = self._of_graph(plan.graph)
        priority = foresight = None
        if self._settings.priority.order != "first_come":
            began_s = time.monotonic() - self._opened_s
            priority = RunPriority(of_graph.remaining, self._settings.priority, self._service, began_s=began_s)
        if self._foresees:
            backend = cast(ForeseeingBackend, self._backend)
            foresight = RunForesight(plan.run_id, of_graph.foresight, backend, again=again)
        return RunOutlook(of_graph.remaining, priority, foresight)

    def _of_graph(self, graph: BuiltGraph) -> _GraphOutlook:
        known = self._graphs.get(id(graph))
        if known is None:
            if len(self._graphs) >= GRAPHS_KEPT:
                self._graphs.clear()
            asks = self._settings.engine.foresight_asks
            known = self._graphs[id(graph)] = _GraphOutlook(
                graph, RemainingPath(graph, self._seconds_of), Foresight(graph, self._variant_of, asks=asks)
            )
        return known

    def _seconds_of(self, role: str) -> float:
        assigned = self._router.assignment.roles.get(role)
        expected_s = None if assigned is None else assigned.expected_s
        return self._settings.priority.ask_s if expected_s is None else expected_s

    def _variant_of(self, role: str, round_number: int) -> str | None:
        return self._router.expect(role, round_number).variant
