"""The assignment problem as a mixed-integer program, with everything that parts share; solved by HiGHS."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from ..probing.profile import Profile
from ..space import Candidate, Choices, Part
from .coupling import Problem, asks_per_load, shared, swap_share
from .limits import Amount, Limits

__all__ = ["OutOfTime", "integer_program"]

OPTIMAL, TIME_LIMIT, INFEASIBLE = 0, 1, 2
GAP = 1e-9


class OutOfTime(Exception):
    """The solver has not finished in its time; never leaves the router."""


class _Program:
    """Columns (all from 0 to 1) and rows of a linear program, added one at a time."""

    def __init__(self) -> None:
        self.integer: list[bool] = []
        self.amounts: dict[str, dict[int, float]] = {}
        self._rows: list[dict[int, float]] = []
        self._upper: list[float] = []
        self._lower: list[float] = []

    def column(self, *, integer: bool = False, **amounts: float) -> int:
        """A new column, and what one unit of it adds to each amount."""
        number = len(self.integer)
        self.integer.append(integer)
        for name, value in amounts.items():
            self.amounts.setdefault(name, {})[number] = value
        return number

    def row(self, terms: dict[int, float], *, upper: float = math.inf, lower: float = -math.inf) -> None:
        """lower <= sum of coefficient · column <= upper."""
        self._rows.append(terms)
        self._lower.append(lower)
        self._upper.append(upper)

    def solve(self, costs: dict[int, float], time_s: float) -> Any:
        """The values of the columns, None when there are none; raises OutOfTime."""
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        count = len(self.integer)
        places = [(r, c, v) for r, terms in enumerate(self._rows) for c, v in terms.items()]
        rows, columns, values = zip(*places, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(self._rows), count)).tocsr()
        objective = np.zeros(count)
        for column, cost in costs.items():
            objective[column] = cost
        result = milp(
            objective,
            integrality=np.array(self.integer, dtype=int),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, self._lower, self._upper),
            options={"time_limit": time_s, "mip_rel_gap": GAP},
        )
        if result.status == INFEASIBLE:
            return None
        if result.status != OPTIMAL:
            raise OutOfTime
        return result.x


def integer_program(
    problem: Problem, limits: Limits, minimise: Amount, exclude: Collection[Choices], *, time_s: float
) -> dict[Part, Candidate] | None:
    """The best choice by prediction, None where no choice keeps the limits.

    Binary x[part, candidate] chooses; an engine, its adapter slots and each adapter are paid for once however many
    parts use them, and so are the steps it makes, in whole or by its tokens; a part saves the longest prefix that it
    shares with one other part of the same variant; the k-th adapter beyond an engine's slots makes a share of its asks
    swap. Quality is a sum of logarithms.
    Raises: OutOfTime.
    """
    program = _Program()
    x: dict[tuple[Part, Candidate], int] = {}
    for part in problem.parts:
        for candidate, row in problem.rows[part].items():
            lone = problem.lone[part, candidate]
            x[part, candidate] = program.column(
                integer=True,
                quality=lone.log_ratio,
                cpu_s=lone.cpu_s,
                latency_s=lone.seconds,
                tokens=lone.tokens,
                memory_mib=0.0 if problem.coupled else _own_memory(problem, row),
            )
        program.row({x[part, c]: 1.0 for c in problem.rows[part]}, lower=1.0, upper=1.0)
    if problem.coupled:
        _share_engines(program, problem, x)
        _share_prefixes(program, problem, x)
    for choices in exclude:
        if all(pair in x for pair in choices.items()):
            program.row({x[pair]: 1.0 for pair in choices.items()}, upper=len(choices) - 1)
    for name, limit in limits.given().items():
        if name == "min_quality":
            lower = math.log(limit / problem.quality) - GAP if limit > 0 else -math.inf
            program.row(program.amounts["quality"], lower=lower)
        else:
            held = problem.serving.process_mib if name == "memory_mib" else 0.0
            program.row(program.amounts[name], upper=limit * (1 + GAP) - held)
    sign = -1.0 if minimise == "quality" else 1.0
    costs = {column: sign * value for column, value in program.amounts[minimise].items()}
    values = program.solve(costs, time_s)
    if values is None:
        return None
    return {
        part: max(problem.rows[part], key=lambda c, part=part: values[x[part, c]])  # type: ignore[misc]
        for part in problem.parts
    }


def _own_memory(problem: Problem, row: Profile) -> float:
    footprint, serving = row.footprint, problem.serving
    slots_mib = footprint.slot_mib if footprint.adapter else 0.0
    return footprint.checkpoint_mib + serving.kv_cache_mib + serving.engine_mib + slots_mib


def _share_engines(program: _Program, problem: Problem, x: dict[tuple[Part, Candidate], int]) -> None:
    """One engine a checkpoint, one set of slots an engine, and swaps where its adapters are more than its slots."""
    serving = problem.serving
    users: dict[str, list[tuple[Part, Candidate, Profile]]] = {}
    for part, candidate in x:
        row = problem.rows[part][candidate]
        users.setdefault(row.footprint.checkpoint, []).append((part, candidate, row))
    for there in users.values():
        each_mib = max(row.footprint.checkpoint_mib for _, _, row in there) + serving.kv_cache_mib + serving.engine_mib
        engine = program.column(memory_mib=each_mib)
        with_adapter = [(p, c, row) for p, c, row in there if row.footprint.adapter]
        for p, c, _ in there:
            program.row({x[p, c]: 1.0, engine: -1.0}, upper=0.0)
        _pay_steps(program, problem, x, there)
        if not with_adapter:
            continue
        slots = program.column(memory_mib=max(row.footprint.slot_mib for _, _, row in with_adapter))
        adapters: dict[str, int] = {}
        for p, c, row in with_adapter:
            program.row({x[p, c]: 1.0, slots: -1.0}, upper=0.0)
            if row.footprint.adapter not in adapters:
                adapters[row.footprint.adapter] = program.column()
            program.row({x[p, c]: 1.0, adapters[row.footprint.adapter]: -1.0}, upper=0.0)
        counts = range(serving.adapter_slots + 1, min(len(adapters), len(problem.parts)) + 1)
        if not counts:
            continue
        beyond = {count: program.column(integer=True) for count in counts}
        program.row({column: 1.0 for column in beyond.values()}, upper=1.0)
        over = {column: -float(count - serving.adapter_slots) for count, column in beyond.items()}
        program.row({**{a: 1.0 for a in adapters.values()}, **over}, upper=float(serving.adapter_slots))
        for count, column in beyond.items():
            for p, c, row in with_adapter:
                waits = row.asks * swap_share(count, serving.adapter_slots)
                loads = waits / asks_per_load(count, serving.running)
                both = program.column(cpu_s=loads * serving.swap_cpu_s, latency_s=waits * serving.swap_s)
                program.row({x[p, c]: 1.0, column: 1.0, both: -1.0}, upper=1.0)


def _pay_steps(
    program: _Program,
    problem: Problem,
    x: dict[tuple[Part, Candidate], int],
    users: Collection[tuple[Part, Candidate, Profile]],
) -> None:
    """An engine pays for a step each turn, or for one each token where its tokens are fewer than the turns."""
    turns = problem.written_tokens / problem.serving.running
    every_turn = program.column(cpu_s=turns * max(row.token_cost.step_cpu_s for _, _, row in users))
    for part, candidate, row in users:
        each_token = program.column(cpu_s=row.written_tokens * row.token_cost.step_cpu_s)
        program.row({x[part, candidate]: 1.0, every_turn: -1.0, each_token: -1.0}, upper=0.0)


def _share_prefixes(program: _Program, problem: Problem, x: dict[tuple[Part, Candidate], int]) -> None:
    """A part saves the longest prefix it shares with a part of the same variant; itself and other runs always count."""
    for (part, candidate), column in x.items():
        row = problem.rows[part][candidate]
        price, wait = row.token_cost.prefill_cpu_s, row.token_cost.prefill_s
        always = max(row.shared_tokens.get("", 0.0), shared(row, row))
        _add(program, column, "cpu_s", -always * price)
        _add(program, column, "latency_s", -always * wait)
        savings = []
        for other in problem.parts:
            partners = [(c, r) for c, r in problem.rows[other].items() if other != part]
            more = {c: shared(row, r) - always for c, r in partners}
            same = [x[other, c] for c, tokens in more.items() if tokens > 0]
            if same:
                tokens = max(more.values())
                saving = program.column(cpu_s=-tokens * price, latency_s=-tokens * wait)
                program.row({saving: 1.0, column: -1.0}, upper=0.0)
                program.row({saving: 1.0, **dict.fromkeys(same, -1.0)}, upper=0.0)
                savings.append(saving)
        if savings:
            program.row(dict.fromkeys(savings, 1.0), upper=1.0)


def _add(program: _Program, column: int, amount: str, value: float) -> None:
    amounts = program.amounts.setdefault(amount, {})
    amounts[column] = amounts.get(column, 0.0) + value
