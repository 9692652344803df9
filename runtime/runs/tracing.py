"""Spans for OpenTelemetry: workflow, step, ask and swap, made from a session's events.

Off unless `tracing` is set. OpenTelemetry's own variables say where spans go (`OTEL_EXPORTER_OTLP_ENDPOINT`,
`OTEL_EXPORTER_OTLP_PROTOCOL`, `OTEL_SERVICE_NAME`, …). Texts of prompts and answers are in them only with
`tracing_texts`; they are then read from the store when their step has ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...agents.errors import SettingsError
from ...agents.graphs.step_paths import StepPath
from ...agents.messages import Message
from ..events import Event
from ..store.store import RunStore
from . import span_names as names

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

__all__ = ["RunTracer", "open_tracer"]

FLUSH_S = 5.0
"""Seconds that the end of a session waits for an endpoint to take the last spans."""

SERVICE = "metier"

MOST_TEXT_CHARACTERS = 20_000
"""Characters of one text in a span; the rest is left out."""

MOST_MESSAGES = 50
"""Messages of a prompt in a span: the last ones."""


class RunTracer:
    """Listens to a session (`on_event`) and writes spans with a provider's tracer.

    A run, its steps and their asks are nested; swaps are spans of their own, since several asks may wait for one load.
    With the session's store as `texts` they say what was asked and answered.
    """

    def __init__(self, provider: TracerProvider, texts: RunStore | None = None) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._tracer = provider.get_tracer(SERVICE)
        self._within = set_span_in_context
        self._client = SpanKind.CLIENT
        self._runs: dict[str, Span] = {}
        self._steps: dict[str, dict[str, Span]] = {}
        self._texts = texts
        self._asked: dict[tuple[str, str], list[_Asked]] = {}

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
                self._end_step(event)
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
            names.KIND: names.KIND_WORKFLOW,
            names.SESSION_ID: event.run_id,
            names.RUN_RESUMED: bool(event.data.get("resumed")),
        }
        self._runs[event.run_id] = self._tracer.start_span(
            f"{names.OPERATION_WORKFLOW} {workflow}", attributes=attributes
        )

    def _end_run(self, run_id: str, error: str) -> None:
        for key in [key for key in self._asked if key[0] == run_id]:
            for ask in self._asked.pop(key):
                self._write_ask(ask, {})
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
            names.KIND: names.KIND_STEP if event.role else names.KIND_TOOL,
            names.SESSION_ID: event.run_id,
            names.OI_AGENT_NAME if event.role else names.OI_TOOL_NAME: event.role or event.step_path,
            names.NODE_ID: event.step_path,
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
            names.KIND: names.KIND_TOOL,
            names.SESSION_ID: event.run_id,
            names.OI_TOOL_NAME: event.data["tool"],
        }
        steps[event.step_path] = self._tracer.start_span(
            f"{names.OPERATION_TOOL} {event.data['tool']}",
            context=None if caller is None else self._within(caller),
            attributes=attributes,
        )

    def _end_step(self, event: Event) -> None:
        span = self._steps.get(event.run_id, {}).pop(event.step_path, None)
        asked = self._asked.pop((event.run_id, event.step_path), [])
        if self._texts is not None and asked:
            texts = self._texts.replies(event.run_id, event.step_path, failed=True)
            for ask, (messages, reply) in zip(reversed(asked), texts, strict=False):
                self._write_ask(ask, _message_attributes(messages, reply))
        if span is not None:
            if self._texts is not None and event.data.get("output"):
                span.set_attribute(names.OUTPUT_VALUE, event.data["output"][:MOST_TEXT_CHARACTERS])
            self._end(span, _error_of(event))

    def _add_ask(self, event: Event) -> None:
        data = event.data
        model = data.get("variant") or "base"
        counts = data | {"output_tokens": data.get("thinking_tokens", 0) + data.get("answer_tokens", 0)}
        counts["total_tokens"] = data.get("prompt_tokens", 0) + counts["output_tokens"]
        attributes: dict[str, Any] = {
            names.OPERATION: names.OPERATION_ASK,
            names.PROVIDER: names.PROVIDER_NAME,
            names.REQUEST_MODEL: model,
            names.RESPONSE_MODEL: model,
            names.AGENT_NAME: event.role,
            names.STEP_PATH: event.step_path,
            names.ROUTE_REASON: data.get("reason", ""),
            names.KIND: names.KIND_ASK,
            names.SESSION_ID: event.run_id,
            names.MODEL_NAME: model,
        }
        for known in (names.ASK_ATTRIBUTES, names.TOKEN_COUNTS):
            attributes |= {name: counts[field] for field, name in known.items() if field in counts}
        ended_ns = time.time_ns()
        step = self._steps.get(event.run_id, {}).get(event.step_path)
        ask = _Asked(model, attributes, ended_ns - int(data.get("seconds", 0.0) * 1e9), ended_ns, step)
        if self._texts is None:
            self._write_ask(ask, {})
        else:  # its texts are in the store once the step has ended
            self._asked.setdefault((event.run_id, event.step_path), []).append(ask)

    def _write_ask(self, ask: _Asked, texts: dict[str, str]) -> None:
        span = self._tracer.start_span(
            f"{names.OPERATION_ASK} {ask.model}",
            context=None if ask.step is None else self._within(ask.step),
            kind=self._client,
            attributes=ask.attributes | texts,
            start_time=ask.began_ns,
        )
        span.end(ask.ended_ns)

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


@dataclass(frozen=True)
class _Asked:
    """An ask that has ended, and whose span waits for its texts."""

    model: str
    attributes: dict[str, Any]
    began_ns: int
    ended_ns: int
    step: Span | None


def _message_attributes(messages: Sequence[Message], reply: str) -> dict[str, str]:
    shown = messages[-MOST_MESSAGES:]
    found = {names.OUTPUT_VALUE: reply, **_message(names.OUTPUT_MESSAGES, 0, "assistant", reply)}
    if shown:
        found[names.INPUT_VALUE] = shown[-1].content
    for at, message in enumerate(shown):
        found |= _message(names.INPUT_MESSAGES, at, message.role, message.content)
    return {name: text[:MOST_TEXT_CHARACTERS] for name, text in found.items()}


def _message(of: str, at: int, role: str, content: str) -> dict[str, str]:
    return {f"{of}.{at}.{names.MESSAGE_ROLE}": role, f"{of}.{at}.{names.MESSAGE_CONTENT}": content}


def _error_of(event: Event) -> str:
    """What a step's span says of its error; of a call, whose error is a text that the model is told, only that."""
    error = str(event.data.get("error", ""))
    return "tool_error: the tool gave an error" if error and "tool" in event.data else error


@contextmanager
def open_tracer(texts: RunStore | None = None) -> Iterator[RunTracer]:
    """A tracer that exports by OTLP as the environment says; its end waits at most `FLUSH_S` for the last spans.

    With a store as `texts`, prompts and answers are in the spans.

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
    tracer = RunTracer(provider, texts)
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
