"""The table of a benchmark: a row for each level of load, from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from ..meters.percentiles import percentile
from .records import RequestRecord

__all__ = ["LevelFigures", "level_figures", "summary_table"]

LevelFigures = dict[str, float]
HEADS: dict[str, tuple[str, ...]] = {
    "asked": ("requests",),
    "failed": ("failed",),
    "TTFT ms": ("ttft_p50_ms", "ttft_p95_ms"),
    "ITL ms": ("itl_p50_ms", "itl_p95_ms"),
    "latency ms": ("latency_p50_ms", "latency_p95_ms"),
    "asks/s": ("requests_per_s",),
    "tokens/s": ("tokens_per_s",),
    "cached %": ("cached_share",),
    "CPU-s": ("cpu_s",),
    "CPU-ms/token": ("cpu_ms_per_token",),
}


def level_figures(records: Sequence[RequestRecord]) -> LevelFigures:
    """Figures of one level; rates are over the time from its first request's start to its last one's end.

    Only what was measured (phase `profiling`) counts; an empty level has no figures.
    """
    measured = [record for record in records if record.metadata.benchmark_phase == "profiling"]
    good = [record for record in measured if record.error is None]
    if not measured:
        return {}

    def values(name: str) -> list[float]:
        return [value for record in good if (value := record.number(name)) is not None]

    start = min(record.metadata.request_start_ns for record in measured)
    seconds = max((max(record.metadata.request_end_ns for record in measured) - start) / 1e9, 1e-9)
    written, prompt, cpu_s = sum(values("output_sequence_length")), sum(values("input_sequence_length")), 0.0
    cpu_s = sum(values("cpu_time")) / 1000
    figures = {"requests": float(len(measured)), "failed": float(len(measured) - len(good))}
    for short, name in (
        ("ttft", "time_to_first_token"),
        ("itl", "inter_token_latency"),
        ("latency", "request_latency"),
    ):
        figures[f"{short}_p50_ms"] = percentile(values(name), 0.5)
        figures[f"{short}_p95_ms"] = percentile(values(name), 0.95)
    return figures | {
        "requests_per_s": len(good) / seconds,
        "tokens_per_s": written / seconds,
        "cached_share": 100 * sum(values("cached_tokens")) / prompt if prompt else 0.0,
        "cpu_s": cpu_s,
        "cpu_ms_per_token": 1000 * cpu_s / written if written else 0.0,
    }


def summary_table(levels: Mapping[str, Sequence[RequestRecord]]) -> Table:
    """A row for each level that was begun; two values in a cell are the median and the 95th percentile."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("load")
    for head in HEADS:
        drawn.add_column(head, justify="right")
    for level, records in levels.items():
        figures = level_figures(records)
        if figures:
            drawn.add_row(
                level, *(" / ".join(_shown(name, figures[name]) for name in names) for names in HEADS.values())
            )
    return drawn


def _shown(name: str, value: float) -> str:
    if name in ("requests", "failed"):
        return f"{value:.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
