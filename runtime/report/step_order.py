"""Which steps of a run had to wait for which, from the workflow's shape and the paths of the steps that ran."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...agents.graphs.step_paths import ROOT, StepPath
from ...agents.graphs.workflow_shape import StepShape, StepsThatRan

__all__ = ["step_order"]


def step_order(body: Sequence[StepShape], paths: Iterable[str]) -> dict[str, frozenset[str]]:
    """Path of each step that ran → the steps that ran right before it and had to.

    Those before come first. Rounds follow each other, items of a fan-out run side by side, and steps that did not run
    delay nothing.
    """
    ran = set(paths)
    places = StepsThatRan(ran)
    order: dict[str, frozenset[str]] = {}

    def through_body(steps: Sequence[StepShape], around: StepPath, start: frozenset[str]) -> frozenset[str]:
        ends: dict[str, frozenset[str]] = {}
        for step in steps:  # in an order that respects their edges
            before = frozenset[str]().union(*(ends[name] for name in step.after)) if step.after else start
            ends[step.name] = through_step(step, around, before)
        waited_for = {name for step in steps for name in step.after}
        return frozenset[str]().union(*(ends[s.name] for s in steps if s.name not in waited_for)) if steps else start

    def through_step(step: StepShape, around: StepPath, start: frozenset[str]) -> frozenset[str]:
        if step.kind == "loop":
            for path in places.of(step, around):
                start = inside(step, path, start)
            return start
        ends = [inside(step, path, start) for path in places.of(step, around)]
        return frozenset[str]().union(*ends) if ends else start

    def inside(step: StepShape, path: StepPath, start: frozenset[str]) -> frozenset[str]:
        if step.body:
            return through_body(step.body, path, start)
        name = str(path)
        if name not in ran:
            return start
        order[name] = start
        return frozenset((name,))

    through_body(body, ROOT, frozenset())
    return order
