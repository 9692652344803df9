"""Costs added up: per role, step or round, and for the whole workflow, with what a solved task takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from ...agents.graphs.step_paths import StepPath
from .critical_path import critical_path_s
from .ledger import AskEntry, Ledger

__all__ = ["Cost", "WorkflowFigures", "by_role", "by_round", "by_step", "run_costs", "workflow_figures"]

K = TypeVar("K", bound=Hashable)


@dataclass
class Cost:
    """The sum of some asks, abandoned ones included: tokens, seconds, CPU-seconds, swaps; who asked, and for whom."""

    asks: int = 0
    corrected: int = 0
    lost: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    thinking_tokens: int = 0
    answer_tokens: int = 0
    queue_s: float = 0.0
    slot_wait_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cpu_s: float = 0.0
    swaps: int = 0
    swap_s: float = 0.0
    variants: Counter[str] = field(default_factory=Counter)
    runs: set[str] = field(default_factory=set)
    steps: set[tuple[str, str]] = field(default_factory=set)

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that were computed rather than found in the prefix cache."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.prompt_tokens + self.thinking_tokens + self.answer_tokens

    @property
    def service_s(self) -> float:
        """Seconds in the engine, waiting apart."""
        return self.prefill_s + self.decode_s

    def add(self, ask: AskEntry) -> None:
        """Add one ask; an abandoned one is counted as an ask where its step recorded it."""
        if not ask.abandoned:
            self.asks += 1
            self.corrected += ask.corrected
            self.lost += ask.lost
        self.variants[ask.variant] += not ask.abandoned
        self.runs.add(ask.run)
        self.steps.add((ask.run, ask.path))
        self.prompt_tokens += ask.prompt_tokens
        self.cached_tokens += ask.cached_tokens
        self.thinking_tokens += ask.thinking_tokens
        self.answer_tokens += ask.answer_tokens
        self.queue_s += ask.queue_s
        self.slot_wait_s += ask.slot_wait_s
        self.prefill_s += ask.prefill_s
        self.decode_s += ask.decode_s
        self.cpu_s += ask.cpu_s
        self.swaps += ask.swaps
        self.swap_s += ask.swap_s


def by_role(ledger: Ledger) -> dict[tuple[str, str], Cost]:
    """(role, variant) → cost, in the order in which they were first asked."""
    return _grouped(ledger.spent, lambda ask: (ask.role, ask.variant))


def by_round(ledger: Ledger) -> dict[tuple[str, int], Cost]:
    """(role, round of its innermost loop) → cost; empty for a workflow without loops."""
    looped = [ask for ask in ledger.spent if StepPath.parse(ask.path).round is not None]
    costs = _grouped(looped, lambda ask: (ask.role, StepPath.parse(ask.path).round or 1))
    order = {role: at for at, role in enumerate(dict.fromkeys(role for role, _ in costs))}
    return dict(sorted(costs.items(), key=lambda item: (order[item[0][0]], item[0][1])))


def by_step(ledger: Ledger) -> dict[str, Cost]:
    """Step (rounds apart, items of a fan-out together) → cost."""
    return _grouped(ledger.spent, lambda ask: StepPath.parse(ask.path).items_together)


def run_costs(ledger: Ledger) -> dict[str, Cost]:
    """Run → cost; runs that asked nothing are there too."""
    costs = {run.id: Cost() for run in ledger.runs}
    for ask in ledger.spent:
        costs[ask.run].add(ask)
    return costs


@dataclass(frozen=True)
class WorkflowFigures:
    """One batch in a line. `completion_s` are finished runs' seconds, `over_bound` their ratios to the critical path.

    `looped` says whether its workflow has a loop, `second_rounds` how many runs had to go through one again.

    `cost_of_pass` maps what is counted (CPU-s, tokens, run seconds, joules) to the whole cost of all attempts, failures
    included, per task solved; empty when nothing was scored, None when nothing was solved.
    """

    runs: int
    states: dict[str, int]
    solved: int
    scored: int
    looped: bool
    second_rounds: int
    wall_s: float
    total: Cost
    completion_s: tuple[float, ...]
    bound_s: tuple[float, ...]
    over_bound: tuple[float, ...]
    cost_of_pass: dict[str, float | None]


def workflow_figures(ledger: Ledger) -> WorkflowFigures:
    """The figures of one batch."""
    total = Cost()
    for ask in ledger.spent:
        total.add(ask)
    finished = [run for run in ledger.runs if run.state == "finished"]
    bounds = critical_path_s(ledger)
    over = [run.busy_s / bounds[run.id] for run in finished if bounds.get(run.id)]
    started = [run.started_at for run in ledger.runs if run.started_at]
    ended = [run.finished_at for run in ledger.runs if run.finished_at]
    solved, scored = len(ledger.solved_runs), len(ledger.scored_runs)
    spent: dict[str, float] = {
        "CPU-s": total.cpu_s,
        "tokens": float(total.tokens),
        "run s": sum(run.busy_s for run in ledger.runs),
    }
    if ledger.energy is not None:
        spent["J"] = ledger.energy.joules
    return WorkflowFigures(
        runs=len(ledger.runs),
        states=dict(Counter(run.state for run in ledger.runs)),
        solved=solved,
        scored=scored,
        looped=any(StepPath.parse(step.path).round is not None for step in ledger.steps),
        second_rounds=len({step.run for step in ledger.steps if _after_round_one(step.path)}),
        wall_s=max(ended) - min(started) if started and ended else 0.0,
        total=total,
        completion_s=tuple(run.busy_s for run in finished),
        bound_s=tuple(bounds[run.id] for run in finished if bounds.get(run.id)),
        over_bound=tuple(over),
        cost_of_pass={name: amount / solved if solved else None for name, amount in spent.items()} if scored else {},
    )


def _after_round_one(path: str) -> bool:
    return any(step.round is not None and step.round > 1 for step in StepPath.parse(path).steps)


def _grouped(asks: Iterable[AskEntry], key: Callable[[AskEntry], K]) -> dict[K, Cost]:
    costs: dict[K, Cost] = {}
    for ask in asks:
        costs.setdefault(key(ask), Cost()).add(ask)
    return costs
