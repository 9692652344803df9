"""The brief report: what every role cost and what was solved, as Markdown for a terminal, from the run store alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from ..store.records import BatchRecord
from ..store.store import RunStore
from .ledger import read_ledger

__all__ = ["render_report"]

NOTHING = "–"

ROLE_SQL = """
SELECT asks.role AS role, coalesce(asks.variant, 'base') AS variant, sum(finish_reason != '') AS asks,
       count(DISTINCT asks.run || '/' || asks.path) AS steps,
       sum(prompt_tokens) AS prompt, sum(cached_tokens) AS cached, sum(thinking_tokens) AS thinking,
       sum(answer_tokens) AS answer, sum(queue_s) AS queue_s, sum(prefill_s) AS prefill_s,
       sum(decode_s) AS decode_s, sum(cpu_s) AS cpu_s, sum(swaps) AS swaps, sum(swap_s) AS swap_s,
       sum(asks.error IS NOT NULL AND finish_reason != '') AS corrected, sum(finish_reason = '') AS lost
FROM (
    SELECT run, path, role, variant, finish_reason, error, asked_at, prompt_tokens, cached_tokens, thinking_tokens,
           answer_tokens, queue_s, prefill_s, decode_s, cpu_s, swaps, swap_s FROM asks
    UNION ALL
    SELECT run, path, role, variant, NULL, NULL, NULL, prompt_tokens, cached_tokens, thinking_tokens,
           answer_tokens, queue_s, prefill_s, decode_s, cpu_s, swaps, swap_s FROM abandoned
) AS asks JOIN runs ON runs.id = asks.run WHERE runs.batch = ? GROUP BY asks.role, coalesce(asks.variant, 'base')
ORDER BY min(asks.asked_at)
"""

STEP_SQL = """
SELECT steps.path AS path, count(*) AS n, avg(steps.finished_at - steps.started_at) AS mean_s
FROM steps JOIN runs ON runs.id = steps.run WHERE runs.batch = ? GROUP BY steps.path
"""


def render_report(store: RunStore, batches: Sequence[str]) -> str:
    """Markdown of one or more batches, finished or broken; several are compared side by side.

    Per batch: runs, tasks solved, rounds, wall and CPU-seconds, cost-of-pass; per role: variant, tokens,
    seconds in queue, prefill and decode, CPU-seconds, adapter swaps, asks that had to be corrected.
    """
    records = [store.batch(batch) for batch in batches]
    lines = ["# metier report", ""]
    if not records:
        return "\n".join([*lines, "No runs yet.", ""])
    lines += _table([_batch_row(store, record) for record in records])
    for record in records:
        lines += ["", f"## {record.label}", "", f"Batch `{record.id}` of workflow `{record.graph}`.", ""]
        lines += _role_tables(store, record.id)
        lines += _accounting(store, record.id)
        lines += _failures(store, record.id)
    pictures = dict.fromkeys(record.picture for record in records)
    for picture in pictures:
        lines += ["", "## Workflow", "", "```mermaid", picture.rstrip(), "```"]
    lines += ["", "## How to read it", "", *_NOTES, ""]
    return "\n".join(lines)


def solved(store: RunStore, batch: str) -> tuple[int, int, int]:
    """Runs solved (score 1), runs scored, runs in all."""
    row = store.query(
        "SELECT sum(score >= 1.0) AS solved, count(score) AS scored, count(*) AS runs FROM runs WHERE batch = ?", batch
    )[0]
    return row["solved"] or 0, row["scored"], row["runs"]


def _batch_row(store: RunStore, record: BatchRecord) -> dict[str, str]:
    runs = store.runs(record.id)
    good, scored, count = solved(store, record.id)
    cpu_s, tokens = _spent(store, record.id)
    finished = [run.busy_s for run in runs if run.state == "finished"]
    started = [run.started_at for run in runs if run.started_at]
    ended = [run.finished_at for run in runs if run.finished_at]
    states: dict[str, int] = {}
    for run in runs:
        states[run.state] = states.get(run.state, 0) + 1
    second = _runs_with_second_round(store, record.id)
    return {
        "batch": record.label,
        "runs": f"{count}" + ("" if states.get("finished") == count else f" ({_counts(states)})"),
        "solved": f"{good} of {scored}" if scored else NOTHING,
        "needed round 2": str(second),
        "wall s": f"{max(ended) - min(started):.1f}" if started and ended else NOTHING,
        "run p50 / p95 s": f"{median(finished):.1f} / {_p95(finished):.1f}" if finished else NOTHING,
        "tokens": str(tokens),
        "CPU-s": f"{cpu_s:.1f}",
        "CPU-s per solved": f"{cpu_s / good:.2f}" if good else ("infinite" if scored else NOTHING),
    }


def _spent(store: RunStore, batch: str) -> tuple[float, int]:
    """CPU-seconds and tokens of a batch, with what got no reply: failures cost too."""
    spent = read_ledger(store, batch).spent
    return sum(ask.cpu_s for ask in spent), sum(ask.tokens for ask in spent)


def _role_tables(store: RunStore, batch: str) -> list[str]:
    """Three narrow tables rather than a wide one: what ran, its tokens, its seconds."""
    rows = store.query(ROLE_SQL, batch)
    ran = [
        {
            "role": r["role"],
            "variant": r["variant"],
            "steps": str(r["steps"]),
            "asks": str(r["asks"]),
            "corrected": str(r["corrected"]),
            "lost": str(r["lost"]),
            "swaps": str(r["swaps"]),
        }
        for r in rows
    ]
    tokens = [
        {
            "role": r["role"],
            "prompt tokens": str(r["prompt"]),
            "of them cached": f"{r['cached']} ({_percent(r['cached'], r['prompt'])})",
            "thinking": str(r["thinking"]),
            "answer": str(r["answer"]),
        }
        for r in rows
    ]
    seconds = [
        {"role": r["role"]}
        | {f"{part} s": f"{r[part + '_s']:.1f}" for part in ("queue", "prefill", "decode")}
        | {"swap s": f"{r['swap_s']:.2f}", "CPU-s": f"{r['cpu_s']:.2f}"}
        for r in rows
    ]
    if not rows:
        return ["Nothing was asked."]
    return [*_table(ran), "", *_table(tokens), "", *_table(seconds)]


def _accounting(store: RunStore, batch: str) -> list[str]:
    totals = store.engine_totals(batch)
    if not totals:
        return []
    charged, _ = _spent(store, batch)
    lines = [""]
    for name, total in totals.items():
        shown = ", ".join(f"{key} {_short(value)}" for key, value in total.items())
        lines.append(f"Engine `{name}`: {shown}.")
    lines.append(f"Charged to the roles above: {charged:.2f} CPU-s.")
    return lines


def _failures(store: RunStore, batch: str) -> list[str]:
    rows = store.query(
        "SELECT error, count(*) AS n, min(id) AS example FROM runs WHERE batch = ? AND error IS NOT NULL "
        "GROUP BY error ORDER BY n DESC LIMIT 5",
        batch,
    )
    if not rows:
        return []
    return ["", "Runs that failed:", "", *(f"- {r['n']}x (`{r['example']}`): {r['error']}" for r in rows)]


def _runs_with_second_round(store: RunStore, batch: str) -> int:
    row = store.query(
        "SELECT count(DISTINCT steps.run) AS n FROM steps JOIN runs ON runs.id = steps.run "
        "WHERE runs.batch = ? AND steps.path LIKE '%[2]/%'",
        batch,
    )[0]
    return int(row["n"])


def _table(rows: list[dict[str, str]]) -> list[str]:
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row[head] for head in heads) + " |" for row in rows]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else NOTHING


def _p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in states.items())


def _short(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else json.dumps(value)


_NOTES = [
    "- *corrected*: replies that did not fit their type; *lost*: asks without a reply (cancelled, timed out, engine"
    " died).",
    "- *cached*: prompt tokens that came from the engine's prefix cache.",
    "- *swaps*: adapter loads, counted with the ask that caused one or was the first to use what was fetched ahead;"
    " *swap s* is what asks waited for loads, so what was fetched ahead costs none.",
    "- *CPU-s*: the engine's process CPU seconds, split over the asks of each step; a swap's go where the swap is"
    " counted.",
    "- *CPU-s per solved* is the cost-of-pass: the cost of all attempts over the number solved, failures counted.",
    "- *queue*, *prefill*, *decode* add up over asks that run side by side, so they exceed the wall time.",
]
