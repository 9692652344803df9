"""Spans for OpenTelemetry: workflow, step, ask and swap, made from a session's events.

Off unless `tracing` is set. OpenTelemetry's own variables say where spans go (`OTEL_EXPORTER_OTLP_ENDPOINT`,
`OTEL_EXPORTER_OTLP_PROTOCOL`, `OTEL_SERVICE_NAME`, …). Texts of prompts and answers are never in them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...agents.errors import SettingsError
from ...agents.graphs.step_paths import StepPath
from ..events import Event
from . import span_names as names

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

__all__ = ["RunTracer", "open_tracer"]

FLUSH_S = 5.0
"""Seconds that the end of a session waits for an endpoint to take the last spans."""

SERVICE = "metier"


class RunTracer:
    """Listens to a session (`on_event`) and writes spans with a provider's tracer.

    A run, its steps and their asks are nested; swaps are spans of their own, since several asks may wait for one load.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._tracer = provider.get_tracer(SERVICE)
        self._within = set_span_in_context
        self._client = SpanKind.CLIENT
        self._runs: dict[str, Span] = {}
        self._steps: dict[str, dict[str, Span]] = {}

    def on_event(self, event: Event) -> None:
        """Begin or end the span that an event is about."""
        match event.kind:
            case "run_started":
                self._begin_run(event)
            case "run_finished":
                self._end_run(event.run_id, "")
            case "run_failed":
                self._end_run(event.run_id, event.data["error"])
            case "run_interrupted":
                self._end_run(event.run_id, "waits for a person")
            case "step_started" if "tool" in event.data:
                self._begin_call(event)
            case "step_started":
                self._begin_step(event)
            case "step_finished" | "step_failed":
                span = self._steps.get(event.run_id, {}).pop(event.step_path, None)
                if span is not None:
                    self._end(span, _error_of(event))
            case "ask_finished":
                self._add_ask(event)
            case "adapter_loaded" | "adapter_evicted":
                self._add_swap(event)

    def close(self) -> None:
        """End the spans that are still open: runs that were cancelled."""
        for run_id in list(self._runs):
            self._end_run(run_id, "cancelled")

    def _begin_run(self, event: Event) -> None:
        self._end_run(event.run_id, "cancelled")  # one that was cancelled here, and is resumed
        workflow = event.run_id.rsplit("-", 3)[0]  # a run's id begins with its graph's name
        attributes: dict[str, str | bool] = {
            names.OPERATION: names.OPERATION_WORKFLOW,
            names.PROVIDER: names.PROVIDER_NAME,
            names.WORKFLOW_NAME: workflow,
            names.CONVERSATION_ID: event.run_id,
            names.RUN_RESUMED: bool(event.data.get("resumed")),
        }
        self._runs[event.run_id] = self._tracer.start_span(
            f"{names.OPERATION_WORKFLOW} {workflow}", attributes=attributes
        )

    def _end_run(self, run_id: str, error: str) -> None:
        for span in self._steps.pop(run_id, {}).values():
            self._end(span, "cancelled")
        run = self._runs.pop(run_id, None)
        if run is not None:
            self._end(run, error)

    def _begin_step(self, event: Event) -> None:
        run = self._runs.get(event.run_id)
        attributes = {
            names.OPERATION: names.OPERATION_STEP if event.role else names.OPERATION_TOOL,
            names.PROVIDER: names.PROVIDER_NAME,
            names.AGENT_NAME: event.role or event.step_path,
            names.STEP_PATH: event.step_path,
            names.CONVERSATION_ID: event.run_id,
        }
        self._steps.setdefault(event.run_id, {})[event.step_path] = self._tracer.start_span(
            f"{attributes[names.OPERATION]} {event.role or event.step_path}",
            context=None if run is None else self._within(run),
            attributes=attributes,
        )

    def _begin_call(self, event: Event) -> None:
        """A call of a tool, within the step that made it."""
        steps = self._steps.setdefault(event.run_id, {})
        caller = steps.get(str(StepPath.parse(event.step_path).parent))
        attributes = {
            names.OPERATION: names.OPERATION_TOOL,
            names.PROVIDER: names.PROVIDER_NAME,
            names.TOOL_NAME: event.data["tool"],
            names.TOOL_TYPE: "function",
            names.STEP_PATH: event.step_path,
            names.CONVERSATION_ID: event.run_id,
        }
        steps[event.step_path] = self._tracer.start_span(
            f"{names.OPERATION_TOOL} {event.data['tool']}",
            context=None if caller is None else self._within(caller),
            attributes=attributes,
        )

    def _add_ask(self, event: Event) -> None:
        data = event.data
        step = self._steps.get(event.run_id, {}).get(event.step_path)
        model = data.get("variant") or "base"
        counts = data | {"output_tokens": data.get("thinking_tokens", 0) + data.get("answer_tokens", 0)}
        attributes: dict[str, Any] = {
            names.OPERATION: names.OPERATION_ASK,
            names.PROVIDER: names.PROVIDER_NAME,
            names.REQUEST_MODEL: model,
            names.RESPONSE_MODEL: model,
            names.AGENT_NAME: event.role,
            names.STEP_PATH: event.step_path,
            names.ROUTE_REASON: data.get("reason", ""),
        }
        attributes |= {name: counts[field] for field, name in names.ASK_ATTRIBUTES.items() if field in counts}
        ended_ns = time.time_ns()
        span = self._tracer.start_span(
            f"{names.OPERATION_ASK} {model}",
            context=None if step is None else self._within(step),
            kind=self._client,
            attributes=attributes,
            start_time=ended_ns - int(data.get("seconds", 0.0) * 1e9),
        )
        span.end(ended_ns)

    def _add_swap(self, event: Event) -> None:
        kind = event.kind.removeprefix("adapter_")
        attributes = {
            names.SWAP_KIND: kind,
            names.SWAP_ADAPTER: str(event.data.get("adapter", "")),
            names.SWAP_ENGINE: str(event.data.get("engine", "")),
        }
        ended_ns = time.time_ns()
        span = self._tracer.start_span(
            f"swap {kind} {attributes[names.SWAP_ADAPTER]}",
            attributes=attributes,
            start_time=ended_ns - int(event.data.get("seconds", 0.0) * 1e9),
        )
        span.end(ended_ns)

    def _end(self, span: Span, error: str) -> None:
        from opentelemetry.trace import StatusCode

        if error:
            span.set_attribute(names.ERROR_TYPE, error.partition(":")[0][:100])
            span.set_status(StatusCode.ERROR, error)
        span.end()


def _error_of(event: Event) -> str:
    """What a step's span says of its error; of a call, whose error is a text that the model is told, only that."""
    error = str(event.data.get("error", ""))
    return "tool_error: the tool gave an error" if error and "tool" in event.data else error


@contextmanager
def open_tracer() -> Iterator[RunTracer]:
    """A tracer that exports by OTLP as the environment says; its end waits at most `FLUSH_S` for the last spans.

    An endpoint that is down costs spans, never a run. Raises: SettingsError when OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter()
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"tracing=True needs {error.name}, which is not installed",
            expected="opentelemetry-sdk and opentelemetry-exporter-otlp, which come with the engine",
            remedy="Install them, or leave tracing off.",
        ) from error
    resource = Resource.create({} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": SERVICE})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = RunTracer(provider)
    try:
        yield tracer
    finally:
        tracer.close()
        provider.force_flush(int(FLUSH_S * 1000))
        provider.shutdown()


def _exporter() -> Any:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as ByGrpc

        return ByGrpc()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as ByHttp

    return ByHttp()
