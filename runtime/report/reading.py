"""How to read a report: what the heads of its tables mean, for those that it shows."""

from __future__ import annotations

from collections.abc import Iterable

from .table import Table

__all__ = ["explained"]

_READING: tuple[tuple[frozenset[str], str], ...] = tuple(
    (frozenset(heads), text)
    for heads, text in (
        (("cached", "computed"), "computed: prompt tokens the engine had to compute; cached: those its prefix cache "
         "had. prompt is their sum."),
        (("corrected", "lost"), "corrected: replies that did not fit their type and were asked again; lost: asks "
         "without a reply (cancelled, timed out, engine died). Both are asks, and what they have used is in the sums."),
        (("queue",), "queue: seconds until an engine began with an ask, of it slot: waiting for another adapter to "
         "leave; swap: waiting for an adapter to load, so what was fetched ahead costs none. Seconds add up over asks "
         "that run side by side, so they exceed the wall time."),
        (("swaps",), "swaps: adapter loads, counted with the ask that caused one or was the first to use what was "
         "fetched ahead."),
        (("CPU-s",), "CPU-s: the engine's process CPU seconds, each step's split over the asks in it; a swap's go "
         "where the swap is counted."),
        (("steps",), "A column that would hold nothing but zeros is left out."),
        (("solved",), "solved, of a role or step: share of the runs it took part in that were solved."),
        (("CPU-s per solved",), "per solved (cost-of-pass): what all attempts have used, failures counted, over the "
         "number of tasks solved."),
        (("run p50 s",), "p50, p95: the median and the 95th percentile of finished runs, interpolated between ranks."),
        (("p50 / bound",), "bound: a run's critical path, the longest chain of its steps with what each took in the "
         "engine and no waiting."),
        (("calls",), "calls of tools: errors came back to the model as the result; not known: begun, and the run ended "
         "before the result was recorded. Seconds of calls that were made at once add up."),
        (("verdict",), "95 % interval: percentile bootstrap of the mean difference over tasks that both batches ran."),
    )
)  # fmt: skip


def explained(tables: Iterable[Table]) -> list[str]:
    """A sentence or two for each head of these tables that needs one."""
    heads = {head for table in tables for head in table.heads}
    return ["Everything here is read from the run store; nothing was measured again."] + [
        text for explains, text in _READING if explains & heads
    ]
