"""CPU-seconds per ask: what an engine used, split over those it worked for, with nothing left over."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

__all__ = ["CpuMeter", "StepCost", "StepRow"]


@dataclass(frozen=True)
class StepRow:
    """One ask's part of one engine step: prompt tokens computed, and answer tokens written (usually 1 or 0)."""

    key: Hashable
    prefill_tokens: int = 0
    decode_tokens: int = 0


class StepCost:
    """CPU seconds of a step as `a · prefill tokens + b · decode tokens + c`, fitted as steps go by.

    Recursive least squares with forgetting, so that it follows a machine that gets busier. The prior is a
    135M model on two cores; after some twenty steps it no longer matters.
    """

    PRIOR_S = (0.5e-3, 1.0e-3, 20.0e-3)
    # Tokens come in hundreds at prefill and in ones at decode: without scales the fit would lose digits.
    _SCALE = (100.0, 10.0, 1.0)
    _FORGETTING = 0.998
    _VARIANCE_LIMIT = 1e6

    def __init__(self) -> None:
        self._theta = [value * scale for value, scale in zip(self.PRIOR_S, self._SCALE, strict=True)]
        self._p = [[1.0 if i == j else 0.0 for j in range(3)] for i in range(3)]

    @property
    def seconds(self) -> tuple[float, float, float]:
        """The fitted (a, b, c): per prefill token, per decode token, per step; never negative."""
        a, b, c = (max(t / scale, 0.0) for t, scale in zip(self._theta, self._SCALE, strict=True))
        return a, b, c

    def observe(self, prefill_tokens: int, decode_tokens: int, cpu_s: float) -> None:
        """Learn from one step."""
        x = (prefill_tokens / self._SCALE[0], decode_tokens / self._SCALE[1], 1.0)
        px = [sum(row[j] * x[j] for j in range(3)) for row in self._p]
        gain_over = self._FORGETTING + sum(x[i] * px[i] for i in range(3))
        gain = [value / gain_over for value in px]
        error = cpu_s - sum(self._theta[i] * x[i] for i in range(3))
        for i in range(3):
            self._theta[i] += gain[i] * error
            for j in range(3):
                self._p[i][j] = (self._p[i][j] - gain[i] * px[j]) / self._FORGETTING
        # With one kind of step only, forgetting would let the unseen directions grow without bound.
        if max(self._p[i][i] for i in range(3)) > self._VARIANCE_LIMIT:
            self._p = [[value / 10 for value in row] for row in self._p]

    def shares(self, rows: Sequence[StepRow]) -> list[float]:
        """Fraction of a step's cost charged to each row; they sum to 1.

        A row is charged for its tokens and an equal part of the step's fixed cost: any one of the rows
        alone would have needed the step.
        """
        a, b, c = self.seconds
        weights = [a * row.prefill_tokens + b * row.decode_tokens + c / len(rows) for row in rows]
        total = sum(weights)
        return [w / total for w in weights] if total > 0 else [1 / len(rows)] * len(rows)


class CpuMeter:
    """The accounts of one engine: every CPU second is charged to an ask, or to `overhead_s` when there was none.

    Time that cannot be attributed to single asks (handing over the replies of a step) is carried over to
    the next step; until then it counts as overhead.

    Keys are the engine's own request numbers. `take` closes an account and returns what it holds. Not
    thread-safe: one thread writes; `total_s` and `overhead_s` may be read from others.
    """

    def __init__(self) -> None:
        self.cost = StepCost()
        self.total_s = 0.0
        self.overhead_s = 0.0
        self._carried_s = 0.0
        self._accounts: dict[Hashable, float] = {}

    def charge(self, key: Hashable, cpu_s: float) -> None:
        """Charge work done for one ask outside a step (its prompt, its swap)."""
        self.total_s += cpu_s
        self._accounts[key] = self._accounts.get(key, 0.0) + cpu_s

    def carry_over(self, cpu_s: float) -> None:
        """Keep CPU seconds for the rows of the next step."""
        self._carried_s += cpu_s
        self.charge_overhead(cpu_s)

    def charge_overhead(self, cpu_s: float) -> None:
        """Charge work done for no ask (idle spinning)."""
        self.total_s += cpu_s
        self.overhead_s += cpu_s

    def charge_step(self, rows: Sequence[StepRow], cpu_s: float) -> None:
        """Split one step's CPU seconds over its rows and learn what tokens cost."""
        if not rows:
            self.carry_over(cpu_s)
            return
        self.cost.observe(sum(r.prefill_tokens for r in rows), sum(r.decode_tokens for r in rows), cpu_s)
        self.total_s += cpu_s
        self.overhead_s -= self._carried_s
        cpu_s, self._carried_s = cpu_s + self._carried_s, 0.0
        for row, share in zip(rows, self.cost.shares(rows), strict=True):
            self._accounts[row.key] = self._accounts.get(row.key, 0.0) + share * cpu_s

    def take(self, key: Hashable) -> float:
        """CPU seconds charged to `key` since it was last taken."""
        return self._accounts.pop(key, 0.0)
