"""/v1/responses as OpenAI's own client sees it: whole, streamed, in a schema, continued, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from metier.agents import ScriptedBackend, ThinkingProfile
from metier.router import Assignment, RoleAssignment
from metier.runtime.server.chat.chat_protocol import Completed
from metier.runtime.server.chat.responses_protocol import ResponsesRequest, response_object
from tests.agents.workflow import Answer
from tests.runtime.served import Served, scripted, server

JSON: Any = {"format": {"type": "json_schema"}}
SCHEMA: Any = {"type": "object", "properties": {"value": {"type": "integer"}}}


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return scripted()


@pytest.fixture(scope="module")
def served(backend: ScriptedBackend) -> Iterator[Served]:
    with server(backend, assignment=Assignment(roles={"solver": RoleAssignment(variant="lora0")})) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def test_a_response_says_what_the_chat_completion_does(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    extra = {"thinking": {"max_tokens": 2}, "priority": -2}
    response = client.responses.create(model="base", input="hi", instructions="Be brief.", extra_body=extra)
    ask = backend.asks[-1]
    assert [(m.role, m.content) for m in ask.messages] == [("system", "Be brief."), ("user", "hi")]
    assert ask.thinking == ThinkingProfile(max_tokens=2) and ask.priority == -2
    assert response.output_text == "one two three" and response.status == "completed"
    message, thought = response.output
    assert thought.type == "reasoning" and thought.content is not None and thought.content[0].text == "let me"
    chat = client.chat.completions.create(model="base", messages=[{"role": "user", "content": "hi"}], extra_body=extra)
    assert response.usage is not None and chat.usage is not None
    assert response.usage.output_tokens == chat.usage.completion_tokens == 5
    assert response.usage.output_tokens_details.reasoning_tokens == 2
    assert response.usage.total_tokens == response.usage.input_tokens + 5

    # What came back may be sent along in the next request; the thought is not asked with.
    items: Any = [item.model_dump() for item in (message, thought)]
    client.responses.create(model="base", input=[{"role": "user", "content": "hi"}, *items])
    assert [(m.role, m.content) for m in backend.asks[-1].messages] == [("user", "hi"), ("assistant", "one two three")]


def test_workflows_and_roles_answer_too(client: openai.OpenAI, served: Served) -> None:
    run = client.responses.create(model="chain", input="2 cows")
    assert run.output_text == '{"value":4}'
    assert served.store.run(run.model_dump()["metier"]["run_id"]).state == "finished"
    assert client.responses.create(model="solver", input='{"expression": "2 + 2"}').output_text == '{"value":4}'


@pytest.mark.parametrize("model", ["chain", "planner", "base"])
def test_a_stream_ends_with_the_whole_response(client: openai.OpenAI, model: str) -> None:
    whole = client.responses.create(model=model, input="2 cows")
    with client.responses.stream(model=model, input="2 cows") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert final.output_text == whole.output_text and final.usage == whole.usage


def test_answers_keep_to_a_schema_and_say_when_they_were_cut(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    wanted: Any = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    client.responses.create(model="base", input="2 cows", text=wanted)
    assert backend.asks[-1].answer_schema == SCHEMA
    assert client.responses.parse(model="chain", input="2 cows", text_format=Answer).output_parsed == Answer(value=4)
    request = ResponsesRequest(model="base", input="hi", max_output_tokens=2)
    cut = Response.model_validate(response_object("1", 0, request, Completed("one two", finish_reason="length")))
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ("{no", 400, "invalid_json", "the body is no JSON"),
        ({"model": "base"}, 400, "invalid_request", "input"),
        ({"model": "base", "input": []}, 400, "invalid_request", "input"),
        ({"model": "base", "input": [{"type": "reasoning", "id": "r"}]}, 400, "invalid_request", "input"),
        ({"model": "nobody", "input": "hi"}, 404, "model_not_found", "expected one of chain, planner"),
        ({"model": "base", "input": "hi", "tools": [{}]}, 400, "invalid_request", "tools.0.type"),
        ({"model": "base", "input": "a", "previous_response_id": "r"}, 404, "previous_response_not_found", "'r'"),
        ({"model": "base", "input": "hi", "max_output_tokens": 10**9}, 400, "invalid_request", "at most 8192"),
        ({"model": "solver", "input": "hi", "instructions": "x"}, 400, "role_has_its_prompt", "name a variant"),
        (
            {"model": "base", "input": "hi", "text": {"format": {"type": "json_schema"}}},
            400,
            "invalid_request",
            "schema",
        ),
    ],
)
def test_a_request_that_is_wrong_is_told_so(served: Served, body: Any, status: int, code: str, said: str) -> None:
    sent = {"content": body} if isinstance(body, str) else {"json": body}
    reply = httpx.post(f"{served.url}/v1/responses", headers={"content-type": "application/json"}, **sent)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["code"] == code and said in error["message"]
