"""The workflow drawn with time and cost on it, as SVG that takes its colours from the page."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ...agents.graphs.step_paths import StepPath
from ...agents.graphs.svg import draw_shape
from ...agents.graphs.workflow_shape import StepShape
from .costs import Cost
from .ledger import Ledger

__all__ = ["draw_workflow"]


@dataclass
class _Figures:
    """What one step of the workflow took, over all runs, rounds and items."""

    cost: Cost
    function_s: float = 0.0
    ran: int = 0


def draw_workflow(ledger: Ledger, number: int = 0) -> str:
    """SVG of the workflow; each role's box says its variants, seconds and CPU-seconds a run, and its share of the cost.

    "" where the store knows no structure. `number` tells several pictures of one page apart.
    """
    if ledger.shape is None or not ledger.shape.body:
        return ""
    figures = _figures(ledger)
    runs = max(sum(run.started_at is not None for run in ledger.runs), 1)
    total = sum(figure.cost.cpu_s for figure in figures.values()) or 1.0
    lines = {path: _lines(path, step, figures[path], runs) for path, step in ledger.shape.walk()}
    shares = {path: figure.cost.cpu_s / total for path, figure in figures.items()}
    return draw_shape(ledger.shape, lines, shares, number)


def _figures(ledger: Ledger) -> dict[str, _Figures]:
    """Workflow path (no rounds, no items) → what was spent there."""
    figures: dict[str, _Figures] = defaultdict(lambda: _Figures(Cost()))
    for ask in ledger.spent:
        figures[StepPath.parse(ask.path).declared].cost.add(ask)
    for step in ledger.steps:
        at = figures[StepPath.parse(step.path).declared]
        at.ran += 1
        at.function_s += 0.0 if step.role else step.finished_at - step.started_at
    return figures


def _lines(path: str, step: StepShape, figures: _Figures, runs: int) -> list[str]:
    """The box's title, and what is below it."""
    title = f"{step.name} ×n" if step.each else step.name
    if step.kind == "loop":
        return [f"{title} · at most {step.rounds} rounds"]
    if step.kind == "person":
        return [title, "a person answers"]
    if step.kind != "role":
        if step.body:
            return [title]
        return [title, f"function · {_short(figures.function_s / runs)} s"]
    cost = figures.cost
    named = step.role if step.role != step.name else ""
    variants = ", ".join(cost.variants) or "not asked"
    seconds = f"{_short(cost.service_s / runs)} s · {_short(cost.cpu_s / runs)} CPU-s"
    return [title, " · ".join(part for part in (named, variants) if part), seconds]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value >= 0.001 or not value else "<0.001"
