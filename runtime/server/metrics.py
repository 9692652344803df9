"""The server's figures for Prometheus: requests, tokens and CPU-seconds per role, runs, slots, engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric

from ..events import Event
from .admission import Admission

__all__ = ["ServerMetrics"]

TOKENS = {
    "prompt": "prompt_tokens",
    "cached": "cached_tokens",
    "thinking": "thinking_tokens",
    "answer": "answer_tokens",
}

Totals = Callable[[], dict[str, dict[str, Any]]]


class ServerMetrics:
    """Counts requests (`count`) and events (`on_event`); `render` is what a scrape gets, vLLM's own figures included.

    Tokens are counted as replies come, per role and variant; roles are those that are served, "" for other asks.
    """

    def __init__(self, admission: Admission, totals: Totals) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("metier_requests", "Requests answered", ["path", "status"], registry=self._registry)
        self._tokens = Counter(
            "metier_tokens", "Tokens of replies; cached ones are among the prompt's", ["role", "variant", "kind"],
            registry=self._registry,
        )  # fmt: skip
        labels = ["role", "variant"]
        self._asks = Counter("metier_asks", "Asks answered", labels, registry=self._registry)
        self._cpu = Counter("metier_ask_cpu_seconds", "CPU-seconds charged to asks", labels, registry=self._registry)
        self._wait = Counter("metier_ask_seconds", "Seconds asks took, queue included", labels, registry=self._registry)
        self._swaps = Counter("metier_swaps", "Adapter loads that asks caused", labels, registry=self._registry)
        self._retries = Counter("metier_retries", "Asks and steps tried again", ["role"], registry=self._registry)
        self._runs = Counter("metier_runs", "Runs ended", ["state"], registry=self._registry)
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("metier_requests_inside", "Requests being answered", lambda: admission.inside),
            ("metier_requests_waiting", "Requests that wait to be let in", lambda: admission.waiting),
            ("metier_requests_refused", "Requests refused with 429 or 503, since the start", lambda: admission.refused),
        )
        for name, text, read in gauges:
            Gauge(name, text, registry=self._registry).set_function(read)
        self._registry.register(_EngineTotals(totals))

    def count(self, path: str, status: int) -> None:
        """Take note of an answered request."""
        self._requests.labels(path, str(status)).inc()

    def on_event(self, event: Event) -> None:
        """Take note of what happened in a run, or to an ask."""
        match event.kind:
            case "ask_finished":
                data, labels = event.data, (event.role, event.data.get("variant") or "base")
                self._asks.labels(*labels).inc()
                self._cpu.labels(*labels).inc(data.get("cpu_s", 0.0))
                self._wait.labels(*labels).inc(data.get("seconds", 0.0))
                self._swaps.labels(*labels).inc(data.get("swaps", 0))
                for kind, name in TOKENS.items():
                    self._tokens.labels(*labels, kind).inc(data.get(name, 0))
            case "ask_retried":
                self._retries.labels(event.role).inc()
            case "run_finished" | "run_failed" | "run_interrupted":
                self._runs.labels(event.kind.removeprefix("run_")).inc()

    def render(self) -> bytes:
        """All figures as text."""
        return generate_latest(self._registry) + generate_latest(REGISTRY)


class _EngineTotals:
    """The engines' own counters, read when they are scraped."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily] = {}
        for engine, totals in self._totals().items():
            for name, value in totals.items():
                if isinstance(value, int | float):
                    family = families.setdefault(
                        name,
                        CounterMetricFamily(f"metier_engine_{name}", f"The engine's own {name}", labels=["engine"]),
                    )
                    family.add_metric([engine], float(value))
        yield from families.values()
