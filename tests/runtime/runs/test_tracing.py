"""Spans: nested as the run is, with GenAI names, to the endpoint that is named, and nowhere without being asked."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from metier.agents import AnswerError, Role, ScriptedBackend, SettingsError, TaskGraph, ToolCall, ToolCalls
from metier.runtime import RunStore, Session, open_session
from metier.runtime.events import Event
from metier.runtime.runs.tracing import MOST_TEXT_CHARACTERS, RunTracer
from metier.runtime.settings.session import load_settings
from tests.agents.workflow import Answer, Puzzle
from tests.runtime.served import graph, scripted

pytestmark = pytest.mark.anyio

Attributes = dict[str, Any]


async def spans_of(backend: ScriptedBackend, events: tuple[Event, ...] = ()) -> list[ReadableSpan]:
    """The spans of one run of the chain, and of events of an engine."""
    memory, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = RunTracer(provider)
    async with open_session(backend=backend, store=":memory:", on_event=tracer.on_event) as session:
        try:
            await session.run(graph, Puzzle(text="2 cows"))
        except AnswerError:
            pass
        for event in events:
            session.emit(event)
    tracer.close()
    return list(memory.get_finished_spans())


async def test_workflow_steps_asks_and_swaps_are_spans_with_genai_names() -> None:
    swap = Event(kind="adapter_loaded", data={"adapter": "lora0", "engine": "base", "seconds": 0.5})
    spans = {span.name: span for span in await spans_of(scripted(), (swap,))}
    workflow, step = spans["invoke_workflow chain"], spans["invoke_agent planner"]
    assert workflow.parent is None and step.parent is not None and workflow.context is not None
    assert step.parent.span_id == workflow.context.span_id
    assert dict(workflow.attributes or {})["gen_ai.workflow.name"] == "chain"
    asks = [span for name, span in spans.items() if name == "chat base"]
    attributes: Attributes = dict(asks[0].attributes or {})
    assert attributes["gen_ai.usage.input_tokens"] > 0 and attributes["gen_ai.usage.output_tokens"] > 0
    assert attributes["gen_ai.agent.name"] == "solver" and attributes["gen_ai.request.model"] == "base"
    swapped = spans["swap loaded lora0"]
    assert swapped.start_time is not None and swapped.end_time is not None
    assert swapped.end_time - swapped.start_time == 500_000_000
    # Nothing of what was asked or answered.
    assert "cows" not in "".join(str(dict(span.attributes or {})) for span in spans.values())


async def test_openinferences_names_stand_beside_them() -> None:
    spans = {span.name: dict(span.attributes or {}) for span in await spans_of(scripted())}
    kinds = {name: attributes.get("openinference.span.kind") for name, attributes in spans.items()}
    assert kinds["invoke_workflow chain"] == "CHAIN" and kinds["invoke_agent planner"] == "AGENT"
    assert kinds["chat base"] == "LLM"
    ask = spans["chat base"]
    assert ask["llm.model_name"] == "base" and ask["llm.token_count.prompt"] == ask["gen_ai.usage.input_tokens"]
    counts = [ask[f"llm.token_count.{name}"] for name in ("prompt", "completion", "total")]
    assert counts[0] + counts[1] == counts[2]
    assert spans["invoke_agent planner"]["session.id"] == ask["session.id"] and ask["session.id"].startswith("chain-")
    assert spans["invoke_agent planner"]["agent.name"] == "planner"


async def spans_with_texts(backend: ScriptedBackend) -> list[tuple[str, Attributes]]:
    memory, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    with RunStore(":memory:") as store:
        tracer = RunTracer(provider, store)
        async with open_session(backend=backend, store=store, on_event=tracer.on_event) as session:
            await session.run(graph, Puzzle(text="2 cows" + "!" * 50_000))
        tracer.close()
    return [(span.name, dict(span.attributes or {})) for span in memory.get_finished_spans()]


async def test_texts_are_there_when_asked_for_and_bounded() -> None:
    spans = await spans_with_texts(scripted())
    asks = [attributes for name, attributes in spans if name == "chat base"]
    planner = next(ask for ask in asks if ask["gen_ai.agent.name"] == "planner")
    content = planner["llm.input_messages.0.message.content"]
    assert planner["llm.input_messages.0.message.role"] in ("system", "user")
    assert max(len(value) for value in planner.values() if isinstance(value, str)) == MOST_TEXT_CHARACTERS
    assert any("2 cows" in str(value) for name, value in planner.items() if "input_messages" in name), content
    assert planner["llm.output_messages.0.message.content"] == planner["output.value"] != ""
    step = next(attributes for name, attributes in spans if name == "invoke_agent planner")
    assert step["output.value"] == planner["output.value"]


async def test_the_texts_of_a_correction_are_each_its_asks() -> None:
    replies = iter(["no json", '{"expression": "8"}'])
    backend = ScriptedBackend({"planner": lambda ask: next(replies)}, default=lambda ask: {"value": 8})
    asks = [attributes for name, attributes in await spans_with_texts(backend) if name == "chat base"]
    told = [ask["output.value"] for ask in asks if ask["gen_ai.agent.name"] == "planner"]
    assert set(told) == {"no json", '{"expression": "8"}'}


async def test_what_fails_is_marked_and_everything_that_began_ends() -> None:
    spans = {span.name: span for span in await spans_of(ScriptedBackend(default=lambda ask: "no json"))}
    for name in ("invoke_workflow chain", "invoke_agent planner"):
        assert not spans[name].status.is_ok and spans[name].end_time is not None
        assert "is no Plan" in str(spans[name].status.description)


def tracing(session: Session) -> bool:
    """Whether a session has a listener."""
    return bool(session._listeners)


async def test_it_is_off_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    async with open_session(backend=scripted(), store=":memory:") as session:
        assert not tracing(session)


async def test_spans_reach_the_endpoint_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[ExportTraceServiceRequest] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *told: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        settings = load_settings(overrides={"tracing": True})
        async with open_session(backend=scripted(), store=":memory:", settings=settings) as session:
            await session.run(graph, Puzzle(text="2 cows"))
        collector.shutdown()
    (resource,) = got[0].resource_spans
    names = sorted(span.name for scope in resource.scope_spans for span in scope.spans)
    assert names == ["chat base", "chat base", "invoke_agent planner", "invoke_agent solver", "invoke_workflow chain"]
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "metier"


async def test_an_endpoint_that_is_down_costs_spans_and_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metier.runtime.runs.tracing.FLUSH_S", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        settings = load_settings(overrides={"tracing": True})
        async with open_session(backend=scripted(), store=":memory:", settings=settings) as session:
            assert (await session.run(graph, Puzzle(text="2 cows"))).value == 4


async def test_without_opentelemetry_the_setting_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    settings = load_settings(overrides={"tracing": True})
    with pytest.raises(SettingsError, match="tracing=True needs opentelemetry.sdk.trace.*come with the engine"):
        async with open_session(backend=scripted(), store=":memory:", settings=settings):
            pass


async def test_calls_of_tools_are_spans_within_their_step() -> None:
    def look(word: str) -> str:
        """Looks up."""
        return word

    memory, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = RunTracer(provider)
    called = ToolCalls(tool_calls=(ToolCall(name="look", arguments={"word": "cows"}), ToolCall(name="look")))
    calling = TaskGraph("calling", takes=Puzzle, gives=Answer)
    calling.step(Role("solver", takes=Puzzle, gives=Answer, tools=[look]))
    backend = ScriptedBackend({"solver": [called, Answer(value=1)]})
    async with open_session(backend=backend, store=":memory:", on_event=tracer.on_event) as session:
        await session.run(calling, Puzzle(text="x"))
    tracer.close()
    spans = memory.get_finished_spans()
    step = next(span for span in spans if span.name == "invoke_agent solver")
    made = [span for span in spans if span.name == "execute_tool look"]
    assert len(made) == 2 and step.context is not None
    for span in made:
        assert span.parent is not None and span.parent.span_id == step.context.span_id
        attributes: Attributes = dict(span.attributes or {})
        assert attributes["gen_ai.operation.name"] == "execute_tool" and attributes["gen_ai.tool.name"] == "look"
    assert [span.status.is_ok for span in made].count(False) == 1
    assert "cows" not in str([(dict(span.attributes or {}), span.status.description) for span in spans])
