"""Two batches on the same tasks: mean differences with intervals from resampling pairs, so that tasks cancel out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...router.probing.intervals import bootstrap_interval, mean
from ..store.records import RunRecord
from .costs import Cost, run_costs
from .ledger import Ledger

__all__ = ["Comparison", "Difference", "compare"]


@dataclass(frozen=True)
class Difference:
    """One figure of two batches: means over the paired runs, and the mean of the differences with its 95 % interval."""

    name: str
    unit: str
    better: int
    pairs: int
    baseline: float
    other: float
    difference: float
    interval: tuple[float, float]

    @property
    def relative(self) -> tuple[float, float, float] | None:
        """Difference and interval as shares of the baseline's mean, None when that is 0."""
        if not self.baseline:
            return None
        low, high = self.interval
        return self.difference / self.baseline, low / self.baseline, high / self.baseline

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or "" where the interval includes no difference."""
        low, high = self.interval
        if low <= 0 <= high:
            return ""
        return "better" if (low > 0) == (self.better > 0) else "worse"


@dataclass(frozen=True)
class Comparison:
    """A batch beside the baseline; `pairs` runs had the same task, of `baseline_runs` and `other_runs`."""

    baseline: str
    other: str
    pairs: int
    baseline_runs: int
    other_runs: int
    differences: tuple[Difference, ...]


def compare(baseline: Ledger, other: Ledger, names: tuple[str, str] | None = None) -> Comparison:
    """Pair the runs of two batches by task and input, and compare what both have.

    Scores are compared where both were scored, seconds where both finished, costs where both ended.
    """
    pairs = _pairs(baseline.runs, other.runs)
    one, two = run_costs(baseline), run_costs(other)
    ended = [(a, b) for a, b in pairs if a.finished_at and b.finished_at]
    finished = [(a, b) for a, b in ended if a.state == b.state == "finished"]
    scored = [(a.score, b.score) for a, b in pairs if a.score is not None and b.score is not None]
    found = [
        _difference("score", "", 1, scored),
        _difference("completion", "s", -1, [(a.busy_s, b.busy_s) for a, b in finished]),
        *(
            _difference(name, unit, -1, [(amount(one[a.id]), amount(two[b.id])) for a, b in ended])
            for name, unit, amount in _AMOUNTS
        ),
    ]
    label = names or (baseline.batch.label, other.batch.label)
    differences = tuple(d for d in found if d is not None and (d.baseline or d.other))
    return Comparison(*label, len(pairs), len(baseline.runs), len(other.runs), differences)


_AMOUNTS: Sequence[tuple[str, str, Callable[[Cost], float]]] = (
    ("CPU time", "CPU-s", lambda cost: cost.cpu_s),
    ("tokens", "", lambda cost: float(cost.tokens)),
    ("computed prompt tokens", "", lambda cost: float(cost.prefilled_tokens)),
    ("generated tokens", "", lambda cost: float(cost.thinking_tokens + cost.answer_tokens)),
    ("asks", "", lambda cost: float(cost.asks)),
    ("waiting for the engine", "s", lambda cost: cost.queue_s + cost.swap_s),
)


def _pairs(ones: Sequence[RunRecord], others: Sequence[RunRecord]) -> list[tuple[RunRecord, RunRecord]]:
    """Runs with the same task and input, first with first where a task occurs several times."""
    waiting: dict[tuple[str | None, str], list[RunRecord]] = defaultdict(list)
    for run in reversed(others):
        waiting[run.task, run.input].append(run)
    return [(run, same.pop()) for run in ones if (same := waiting[run.task, run.input])]


def _difference(name: str, unit: str, better: int, pairs: Sequence[tuple[float, float]]) -> Difference | None:
    if not pairs:
        return None
    differences = [b - a for a, b in pairs]
    return Difference(
        name=name,
        unit=unit,
        better=better,
        pairs=len(pairs),
        baseline=mean([a for a, _ in pairs]),
        other=mean([b for _, b in pairs]),
        difference=mean(differences),
        interval=bootstrap_interval(differences),
    )
