"""The report's tables, the same for every renderer: what roles, steps and engines cost, and what batches came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...agents.graphs.step_paths import StepPath
from ...router.assignment import BASE
from ..meters.percentiles import percentile
from .comparison import Comparison
from .costs import Cost, WorkflowFigures, by_role, by_round, by_step
from .ledger import CallEntry, Ledger
from .table import NOTHING, Group, Table, count, number, percent

__all__ = [
    "accounting_table",
    "assignment_table",
    "batch_table",
    "comparison_table",
    "failure_table",
    "role_table",
    "round_table",
    "step_table",
    "tool_table",
]

STEP_ROWS = 100

# --- what roles, rounds and steps cost ------------------------------------------------------------------------

_Column = tuple[str, str, Callable[[Cost], str], Callable[[Cost], float]]
_COLUMNS: Sequence[_Column] = (
    ("asks", "steps", lambda c: count(len(c.steps)), lambda c: 1.0),
    ("asks", "asks", lambda c: count(c.asks), lambda c: 1.0),
    ("asks", "corrected", lambda c: count(c.corrected), lambda c: c.corrected),
    ("asks", "lost", lambda c: count(c.lost), lambda c: c.lost),
    ("tokens", "prompt", lambda c: count(c.prompt_tokens), lambda c: 1.0),
    ("tokens", "cached", lambda c: _cached(c), lambda c: 1.0),
    ("tokens", "computed", lambda c: count(c.prefilled_tokens), lambda c: 1.0),
    ("tokens", "thinking", lambda c: count(c.thinking_tokens), lambda c: c.thinking_tokens),
    ("tokens", "answer", lambda c: count(c.answer_tokens), lambda c: 1.0),
    ("seconds", "queue", lambda c: number(c.queue_s), lambda c: 1.0),
    ("seconds", "slot", lambda c: number(c.slot_wait_s), lambda c: c.slot_wait_s),
    ("seconds", "swap", lambda c: number(c.swap_s), lambda c: c.swap_s),
    ("seconds", "prefill", lambda c: number(c.prefill_s), lambda c: 1.0),
    ("seconds", "decode", lambda c: number(c.decode_s), lambda c: 1.0),
    ("cost", "swaps", lambda c: count(c.swaps), lambda c: c.swaps),
    ("cost", "CPU-s", lambda c: number(c.cpu_s), lambda c: 1.0),
)
_UNITS = {"tokens": "tokens", "seconds": "s"}


def _cached(cost: Cost) -> str:
    return f"{count(cost.cached_tokens)} ({percent(cost.cached_tokens, cost.prompt_tokens)})"


def role_table(ledger: Ledger) -> Table | None:
    """What each role cost on each variant that played it."""
    costs = by_role(ledger)
    return _cost_table(ledger, ("role", "variant"), {(role, variant): cost for (role, variant), cost in costs.items()})


def round_table(ledger: Ledger) -> Table | None:
    """What each role cost in each round of its loop."""
    costs = by_round(ledger)
    keyed: dict[tuple[str, ...], Cost]
    keyed = {(role, str(at), ", ".join(cost.variants) or BASE): cost for (role, at), cost in costs.items()}
    return _cost_table(ledger, ("role", "round", "variant"), keyed)


def step_table(ledger: Ledger) -> Table | None:
    """What each step cost; the cheapest of very many are one row."""
    costs = by_step(ledger)
    keyed: dict[tuple[str, ...], Cost]
    keyed = {(path, ", ".join(cost.variants) or BASE): cost for path, cost in costs.items()}
    if len(keyed) > STEP_ROWS:
        dearest = sorted(keyed, key=lambda key: -keyed[key].cpu_s)[: STEP_ROWS - 1]
        rest = (f"{len(keyed) - len(dearest)} further steps", "")
        kept = {key: cost for key, cost in keyed.items() if key in set(dearest)}
        paths = {path for path, _ in kept}
        for ask in ledger.spent:
            if StepPath.parse(ask.path).items_together not in paths:
                kept.setdefault(rest, Cost()).add(ask)
        keyed = kept
    return _cost_table(ledger, ("step", "variant"), keyed)


def tool_table(ledger: Ledger) -> Table | None:
    """How often each tool was called, how long that took, and how often it failed."""
    by_tool: dict[str, list[CallEntry]] = {}
    for call in ledger.calls:
        by_tool.setdefault(call.tool, []).append(call)
    rows = []
    for name, calls in sorted(by_tool.items(), key=lambda item: -len(item[1])):
        seconds = [call.seconds for call in calls if not call.open]
        row = [name, count(len(calls))]
        row += [count(sum(call.failed for call in calls)), count(len(calls) - len(seconds)), number(sum(seconds))]
        row += [number(percentile(seconds, q)) if seconds else NOTHING for q in (0.5, 0.95)]
        rows.append(tuple(row))
    heads = ("tool", "calls", "errors", "not known", "seconds", "p50 s", "p95 s")
    return Table(heads, tuple(rows)) if rows else None


def _cost_table(ledger: Ledger, names: tuple[str, ...], costs: Mapping[tuple[str, ...], Cost]) -> Table | None:
    """Empty columns are left out."""
    if not costs:
        return None
    columns = [column for column in _COLUMNS if any(column[3](cost) for cost in costs.values())]
    counts = Counter(title for title, *_ in columns)
    groups = [Group("", len(names)), *(Group(title, n, _UNITS.get(title, "")) for title, n in counts.items())]
    heads = (*names, *(head for _, head, _, _ in columns))
    rows = [(*key, *(shown(cost) for _, _, shown, _ in columns)) for key, cost in costs.items()]
    if ledger.scored_runs:
        heads = (*heads, "solved")
        groups.append(Group("quality", 1))
        rows = [(*row, _solved(ledger, cost)) for row, cost in zip(rows, costs.values(), strict=True)]
    return Table(heads, tuple(rows), len(names), tuple(groups))


def _solved(ledger: Ledger, cost: Cost) -> str:
    scored = cost.runs & ledger.scored_runs
    return percent(len(scored & ledger.solved_runs), len(scored))


# --- whole batches ----------------------------------------------------------------------------------------------


def batch_table(figures: Mapping[str, WorkflowFigures]) -> Table:
    """One row per batch: what came of it, how long it took, what a solved task cost."""
    amounts = list(dict.fromkeys(name for f in figures.values() for name in f.cost_of_pass))
    bounded = any(f.over_bound for f in figures.values())
    looped = any(f.looped for f in figures.values())
    of_bound = ("p50 / bound", "p95 / bound") if bounded else ()
    per_solved = [f"{name} per solved" for name in amounts]
    heads = ["batch", "runs", "solved", *(["needed round 2"] if looped else []), "wall s", "run p50 s", "run p95 s"]
    heads += [*of_bound, "CPU-s", "tokens", *per_solved]
    rows = []
    for name, f in figures.items():
        states = "" if set(f.states) <= {"finished"} else f" ({', '.join(f'{n} {s}' for s, n in f.states.items())})"
        row = [name, f"{f.runs}{states}", f"{f.solved} of {f.scored}" if f.scored else NOTHING]
        row += [count(f.second_rounds)] if looped else []
        row += [number(f.wall_s)]
        row += [number(percentile(f.completion_s, q)) if f.completion_s else NOTHING for q in (0.5, 0.95)]
        if bounded:
            row += [f"{percentile(f.over_bound, q):.2f}×" if f.over_bound else NOTHING for q in (0.5, 0.95)]
        row += [number(f.total.cpu_s), count(f.total.tokens)]
        row += [_per_solved(f, amount) for amount in amounts]
        rows.append(tuple(row))
    details = (*of_bound, *(head for head in per_solved if head != "CPU-s per solved"))
    return Table(tuple(heads), tuple(rows), details=details)


def _per_solved(figures: WorkflowFigures, amount: str) -> str:
    if amount not in figures.cost_of_pass:
        return NOTHING
    value = figures.cost_of_pass[amount]
    return "∞" if value is None else number(value)


def comparison_table(comparison: Comparison) -> Table:
    """Means of both batches, their difference with its interval, and what that is of the baseline."""
    rows = []
    for d in comparison.differences:
        low, high = d.interval
        relative = d.relative
        rows.append(
            (
                f"{d.name}, {d.unit}" if d.unit else d.name,
                count(d.pairs),
                number(d.baseline),
                number(d.other),
                _signed(d.difference),
                f"{_signed(low)} to {_signed(high)}",
                NOTHING if relative is None else f"{100 * relative[0]:+.0f} %",
                d.verdict or "no clear difference",
            )
        )
    heads = (
        "per task", "pairs", comparison.baseline, comparison.other, "difference", "95 % interval", "change", "verdict",
    )  # fmt: skip
    return Table(heads, tuple(rows))


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def accounting_table(ledger: Ledger, total: Cost) -> Table | None:
    """The engines' own counts beside what the asks add up to; the two agree unless an engine has died."""
    if not ledger.totals:
        return None
    names = (("prefill_tokens", "computed prompt tokens"), ("decode_tokens", "decoded tokens"), ("asks", "replies"),
             ("steps", "steps"), ("adapter_loads", "loads"), ("adapter_prefetches", "ahead"),
             ("adapter_evictions", "evictions"), ("restarts", "restarts"), ("cpu_s", "CPU-s"),
             ("overhead_cpu_s", "idle CPU-s"), ("start_s", "start s"))  # fmt: skip
    rows = [
        (engine, *(_amount(totals.get(name, 0)) for name, _ in names))
        for engine, totals in sorted(ledger.totals.items())
    ]
    first = ledger.asks and sum(not ask.lost for ask in ledger.asks)
    generated = total.thinking_tokens + total.answer_tokens
    charged = {
        "prefill_tokens": count(total.prefilled_tokens),
        "decode_tokens": count(max(generated - (first or 0), 0)),
        "asks": count(sum(not ask.lost for ask in ledger.asks)),
        "adapter_loads": count(total.swaps),
        "cpu_s": number(total.cpu_s),
    }
    rows.append(("asks of this batch", *(charged.get(name, "") for name, _ in names)))
    return Table(("engine", *(head for _, head in names)), tuple(rows))


def _amount(value: Any) -> str:
    return number(value) if isinstance(value, float) else count(value)


def failure_table(ledger: Ledger) -> Table | None:
    """Why runs failed, the most frequent first."""
    failed: dict[str, list[str]] = {}
    for run in ledger.runs:
        if run.error:
            failed.setdefault(run.error, []).append(run.id)
    if not failed:
        return None
    ordered = sorted(failed.items(), key=lambda item: -len(item[1]))[:10]
    return Table(("what went wrong", "example", "runs"), tuple((e, ids[0], count(len(ids))) for e, ids in ordered), 2)


def assignment_table(ledger: Ledger) -> Table | None:
    """Which variant was chosen for which role, and why."""
    roles = (ledger.batch.options.get("assignment") or {}).get("roles") or {}
    rows = []
    for role, chosen in roles.items():
        given: dict[str, Any] = {"variant": chosen} if isinstance(chosen, str) else chosen
        variant = str(given.get("variant", BASE))
        later = ", ".join(f"round {at}: {name}" for at, name in (given.get("rounds") or {}).items())
        rows.append((role, f"{variant} ({later})" if later else variant, str(given.get("reason", ""))))
    return Table(("role", "variant", "why"), tuple(rows), 3) if rows else None
