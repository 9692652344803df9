"""One line per request, with the field names of AIPerf's `profile_export.jsonl`, so that its tools read it.

https://github.com/ai-dynamo/aiperf, docs/tutorials/working-with-profile-exports.md. What AIPerf has no names for
(cached tokens, queueing, CPU time, adapter swaps) stands beside it under names of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ...agents.messages import Ask, Usage

__all__ = ["ErrorDetails", "MetricValue", "Phase", "RequestMetadata", "RequestRecord", "request_metrics"]

Phase = Literal["warmup", "profiling"]
CANCELLED = 499
FAILED = 500


class MetricValue(BaseModel):
    """A value with its unit; `inter_chunk_latency` has one for each pause."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | int | list[float]
    """A number, or a list of numbers."""
    unit: str
    """The unit as AIPerf names it: `ms`, `tokens` …"""


class RequestMetadata(BaseModel):
    """Which request it was, and when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    session_num: int
    """Number of the conversation within its level of load."""
    x_request_id: str
    """Id of the request."""
    x_correlation_id: str
    """Id that the requests of one conversation share."""
    conversation_id: str
    """Name of the conversation in the workload."""
    turn_index: int
    """Which turn of its conversation the request is, from 0."""
    request_start_ns: int
    """When it was asked, in nanoseconds since 1970."""
    request_ack_ns: int | None
    """When the first text came; None where none was streamed."""
    request_end_ns: int
    """When its reply was whole, or it failed."""
    worker_id: str
    """AIPerf's name for what asked; here one worker for each conversation at a time."""
    record_processor_id: str
    """AIPerf's name for the process that wrote the record."""
    benchmark_phase: Phase
    """`warmup` before the measurement, `profiling` in it."""
    was_cancelled: bool = False
    """Whether the request was cancelled."""
    cancellation_time_ns: int | None = None
    """When it was cancelled."""
    load: str
    """Name of the level of load that it was part of."""
    role: str
    """Role of the ask, "" where the workload has none."""
    variant: str
    """Variant that answered; `base` is one."""


class ErrorDetails(BaseModel):
    """Why a request failed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: int
    """499 for a request that was cancelled, 500 for any other."""
    type: str
    """Name of the error's class."""
    message: str
    """The error's text."""


class RequestRecord(BaseModel):
    """One request and its metrics: a line of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metadata: RequestMetadata
    """Which request it was, and when."""
    metrics: dict[str, MetricValue]
    """Metric's name → its value; empty where the request failed."""
    error: ErrorDetails | None = None
    """Why it failed, None where it did not."""

    def number(self, name: str) -> float | None:
        """A metric's value, None where this request has none of that name."""
        metric = self.metrics.get(name)
        return None if metric is None or isinstance(metric.value, list) else float(metric.value)


def request_metrics(
    ask: Ask, usage: Usage, start_s: float, pieces_s: Sequence[float], end_s: float
) -> dict[str, MetricValue]:
    """AIPerf's metrics of a request: `pieces_s` are the moments at which text came, on the clock of start and end.

    Thinking is not streamed: where there was some, the time to the first token is what the engine reports (queue, swap
    and prefill). The latency between tokens is the time after the first token, divided by the number of tokens after
    it.
    """
    latency = end_s - start_s
    engine_first = usage.queue_s + usage.swap_s + usage.prefill_s
    first = pieces_s[0] - start_s if pieces_s and not usage.thinking_tokens else min(engine_first, latency)
    written = usage.output_tokens
    metrics = {
        "request_latency": MetricValue(value=1000 * latency, unit="ms"),
        "time_to_first_token": MetricValue(value=1000 * first, unit="ms"),
        "input_sequence_length": MetricValue(value=usage.prompt_tokens, unit="tokens"),
        "output_sequence_length": MetricValue(value=written, unit="tokens"),
        "output_token_count": MetricValue(value=usage.answer_tokens, unit="tokens"),
    }
    if usage.thinking_tokens:
        metrics["reasoning_token_count"] = MetricValue(value=usage.thinking_tokens, unit="tokens")
    if len(pieces_s) > 1:
        pauses = [1000 * (b - a) for a, b in zip(pieces_s, pieces_s[1:], strict=False)]
        metrics["inter_chunk_latency"] = MetricValue(value=[round(pause, 3) for pause in pauses], unit="ms")
    if written > 1 and latency > first:
        pause = (latency - first) / (written - 1)
        metrics["inter_token_latency"] = MetricValue(value=1000 * pause, unit="ms")
        metrics["output_token_throughput_per_user"] = MetricValue(value=1 / pause, unit="tokens/sec/user")
    metrics |= {
        "cached_tokens": MetricValue(value=usage.cached_tokens, unit="tokens"),
        "queue_time": MetricValue(value=1000 * usage.queue_s, unit="ms"),
        "prefill_time": MetricValue(value=1000 * usage.prefill_s, unit="ms"),
        "decode_time": MetricValue(value=1000 * usage.decode_s, unit="ms"),
        "cpu_time": MetricValue(value=1000 * usage.cpu_s, unit="ms"),
        "adapter_swaps": MetricValue(value=usage.swaps, unit="count"),
        "swap_time": MetricValue(value=1000 * usage.swap_s, unit="ms"),
    }
    return metrics
