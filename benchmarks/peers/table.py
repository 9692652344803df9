"""The comparison as a Markdown table, from the journal's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from harness import spread

from metier.runtime.meters.percentiles import percentile

__all__ = ["markdown", "ratios"]

NAMES = {"stock": "vLLM's server", "ours": "`metier serve`", "embedded": "metier, embedded", "ceiling": "the ceiling"}
REFERENCE, CEILING = "stock/langgraph", "ceiling"
Row = dict[str, Any]


def per_minute(row: Row) -> float:
    """Programs a minute."""
    return float(60 * row["programs"] / row["wall_s"])


def ratios(rows: Sequence[Row], arm: str, other: str) -> list[float]:
    """Programs a minute of one arm over another's, for each round that has both."""
    by_round = {(row["arm"], row["round"]): per_minute(row) for row in rows}
    numbers = sorted({row["round"] for row in rows})
    return [
        by_round[arm, number] / by_round[other, number]
        for number in numbers
        if (arm, number) in by_round and (other, number) in by_round
    ]


COLUMNS: dict[str, tuple[Callable[[Row], float], str]] = {
    "programs/min": (per_minute, ".1f"),
    "p50 s": (lambda row: percentile(row["program_s"], 0.5), ".1f"),
    "p95 s": (lambda row: percentile(row["program_s"], 0.95), ".1f"),
    "client CPU-ms/ask": (lambda row: 1000 * row["cpu_s"] / row["asks"], ".1f"),
    "server CPU-s/program": (lambda row: row["server_cpu_s"] / row["programs"], ".2f"),
    "CPU-s/program": (lambda row: (row["cpu_s"] + row["server_cpu_s"]) / row["programs"], ".2f"),
    "server MiB": (lambda row: row["server_mib"], ".0f"),
    "client MiB": (lambda row: row["client_mib"], ".0f"),
    "client installed MiB": (lambda row: row.get("client_installed_mib", 0.0), ".0f"),
    "prompt tokens": (lambda row: row["prompt_tokens"], ".0f"),
    "tokens written": (lambda row: row["output_tokens"], ".0f"),
}
OF_A_SERVER = {"client CPU-ms/ask", "server CPU-s/program", "server MiB", "client installed MiB"}


def markdown(rows: Sequence[Row]) -> str:
    """A row for each arm: medians over its rounds, spread of the first column, ratios taken within rounds."""
    head = ["served by / client", "rounds", *COLUMNS, "÷ LangGraph on vLLM's", "÷ ceiling"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        cells = [_name(arm), str(len(own))]
        for column, (value, form) in COLUMNS.items():
            values = [value(row) for row in own]
            if "/" not in arm and column in OF_A_SERVER:
                cells.append("")
            else:
                cells.append(spread(values, form) if column == "programs/min" else f"{median(values):{form}}")
        cells += [spread(ratios(rows, arm, other), ".2f") for other in (REFERENCE, CEILING)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _name(arm: str) -> str:
    host, _, client = arm.partition("/")
    return f"{NAMES[host]} / {client}" if client else NAMES[host]
