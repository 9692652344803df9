"""The server as OpenAI's own client sees it: completions, streams, usage, errors, cancellation, queue."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import anyio.lowlevel
import httpx
import openai
import pytest

from metier.agents import Ask, RunError, ScriptedBackend, ThinkingProfile
from metier.agents.errors import EngineDeadError, EngineError
from metier.router import Assignment, RoleAssignment
from metier.runtime.settings.session import load_settings
from tests.agents.workflow import Answer
from tests.runtime.served import Gate, Served, scripted, server

HELLO: Any = [{"role": "user", "content": "2 cows"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with server(scripted(), assignment=Assignment(roles={"solver": RoleAssignment(variant="lora0")})) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def small(**overrides: Any) -> Any:
    """Settings of a server whose bounds a test can reach."""
    bounds = {"drain_s": 1.0, **overrides}
    return load_settings(overrides={f"server.{name}": value for name, value in bounds.items()})


# --- what is served -------------------------------------------------------------------------------------------


def test_models_are_workflows_roles_and_variants(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["chain", "planner", "solver", "base", "lora0"]
    assert client.models.retrieve("variant:lora0").id == "variant:lora0"
    with pytest.raises(openai.NotFoundError, match=r"'nobody' is not served; expected one of chain, planner"):
        client.models.retrieve("nobody")


def test_a_workflow_answers_with_its_output_and_the_usage_of_all_its_asks(
    client: openai.OpenAI, served: Served
) -> None:
    reply = client.chat.completions.create(model="chain", messages=HELLO)
    assert reply.choices[0].message.content == '{"value":4}'
    run_id = reply.model_dump()["metier"]["run_id"]
    (row,) = served.store.query(
        "SELECT sum(prompt_tokens) AS p, sum(answer_tokens) AS a FROM asks WHERE run = ?", run_id
    )
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (row["p"], row["a"])
    assert served.store.run(run_id).state == "finished"


def test_a_role_is_asked_in_its_own_prompt_by_the_variant_it_is_assigned() -> None:
    backend = scripted()
    with server(backend, assignment=Assignment(roles={"solver": RoleAssignment(variant="lora0")})) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")
        reply = client.chat.completions.create(
            model="solver",
            messages=[
                {"role": "user", "content": '{"expression": "2 + 2"}'},
                {"role": "assistant", "content": "5"},
                {"role": "user", "content": "Look again."},
            ],
            extra_body={"thinking": 8, "priority": -3, "metier": {"round": 2, "task": "cows"}},
        )
    assert reply.choices[0].message.content == '{"value":4}'
    (ask,) = backend.asks
    assert ask.variant == "lora0" and ask.role == "solver" and ask.round == 2 and ask.task == "cows"
    assert ask.priority == -3 and ask.thinking == ThinkingProfile(max_tokens=8) and ask.max_tokens == 32
    assert "Evaluate it." in ask.messages[1].content and "2 + 2" in ask.messages[1].content
    assert [m.content for m in ask.messages[2:]] == ["5", "Look again."]
    assert ask.answer_schema == Answer.model_json_schema()


def test_a_variant_gets_the_messages_as_they_are_and_its_thinking_comes_apart(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="base",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        extra_body={"thinking": {"max_tokens": 2}},
    )
    assert reply.choices[0].message.content == "one two three"
    assert reply.choices[0].message.model_dump()["reasoning_content"] == "let me"
    assert reply.usage is not None and reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 2
    assert reply.usage.completion_tokens == 5 and reply.usage.total_tokens == 5 + reply.usage.prompt_tokens


@pytest.mark.parametrize("model", ["chain", "planner", "base"])
def test_a_stream_says_what_the_whole_reply_says(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=HELLO)
    pieces = list(
        client.chat.completions.create(model=model, messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "stop"
    assert pieces[-1].usage is not None and whole.usage is not None
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens


def test_answers_keep_to_a_json_schema() -> None:
    backend = scripted()
    with server(backend) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")
        schema = {"type": "object", "properties": {"value": {"type": "integer"}}}
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        client.chat.completions.create(model="base", messages=HELLO, response_format=wanted)
        assert backend.asks[0].answer_schema == schema
        client.chat.completions.create(model="chain", messages=HELLO, response_format=wanted)
        with pytest.raises(openai.BadRequestError, match="asks role 'planner' for value; expected what it gives: expr"):
            client.chat.completions.create(model="planner", messages=HELLO, response_format=wanted)


# --- bad requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ("{no", 400, "invalid_json", "the body is no JSON"),
        ("[]", 400, "invalid_json", "the body is no JSON object"),
        ({"model": "base"}, 400, "invalid_request", "messages"),
        ({"model": "nobody", "messages": HELLO}, 404, "model_not_found", "expected one of chain, planner"),
        ({"model": "base", "messages": []}, 400, "invalid_request", "messages=[]"),
        ({"model": "base", "messages": HELLO, "n": 9}, 400, "invalid_request", "n=9; expected at most 8"),
        ({"model": "base", "messages": HELLO, "logprob": True}, 400, "unknown_field", "unknown field 'logprob'"),
        ({"model": "base", "messages": HELLO, "max_tokens": 10**9}, 400, "invalid_request", "at most 8192"),
        ({"model": "base", "messages": HELLO, "thinking": -1}, 400, "invalid_request", "thinking max_tokens=-1"),
        ({"model": "chain", "messages": HELLO, "temperature": 1}, 400, "unsupported_parameter", "what its roles say"),
        ({"model": "chain", "messages": HELLO * 2}, 400, "one_message", "expected one user message"),
        ({"model": "solver", "messages": HELLO}, 200, None, ""),
        (
            {"model": "solver", "messages": [{"role": "user", "content": "{}"}]},
            400,
            "invalid_input",
            '"expression": str',
        ),
        (
            {"model": "solver", "messages": [{"role": "system", "content": "x"}, *HELLO]},
            400,
            "role_has_its_prompt",
            "name a variant",
        ),
        (
            {"model": "base", "messages": HELLO, "response_format": {"type": "json_schema"}},
            400,
            "invalid_request",
            "without a schema",
        ),
    ],
)
def test_a_request_that_is_wrong_is_told_so_in_openais_shape(
    served: Served, body: Any, status: int, code: str | None, said: str
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = httpx.post(served.url + CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == code and said in error["message"] and "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (EngineError("the engine failed"), 500, "engine_error"),
        (EngineDeadError("the engine is gone"), 503, "engine_restarting"),
        (RunError("no"), 422, "run_failed"),
        (ZeroDivisionError("a secret of the inside"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_inside_is_named_and_nothing_of_the_inside_is_told(
    raised: Exception, status: int, code: str, stream: bool
) -> None:
    def fail(ask: Ask) -> str:
        raise raised

    with server(ScriptedBackend(default=fail)) as served:
        body = {"model": "base", "messages": HELLO, "stream": stream}
        answer = httpx.post(served.url + CHAT, json=body)
        assert "secret" not in answer.text and "Traceback" not in answer.text
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_what_goes_wrong_in_the_middle_of_a_stream_is_its_last_event() -> None:
    class Breaks:
        async def reply(self, ask: Ask, *, on_text: Any = None) -> Any:
            on_text("one ")
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            raise EngineDeadError("the engine is gone")

    with server(Breaks()) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
        said = []
        with pytest.raises(openai.APIError, match="the engine is gone"):
            for piece in client.chat.completions.create(model="base", messages=HELLO, stream=True):
                said.append(piece.choices[0].delta.content)
        assert said == ["one "]


def test_a_failed_run_names_its_run(served: Served) -> None:
    with server(ScriptedBackend({"planner": lambda ask: "no json"})) as broken:
        error = httpx.post(broken.url + CHAT, json={"model": "chain", "messages": HELLO}).json()["error"]
        assert (
            error["code"] == "run_failed" and "is no Plan" in error["message"] and "/v1/runs/chain-" in error["message"]
        )


def test_a_body_that_is_too_large_is_refused_announced_or_not() -> None:
    with server(scripted(), settings=small(request_kib=1)) as served:
        long = json.dumps({"model": "base", "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
        announced = httpx.post(served.url + CHAT, content=long)
        pieces = httpx.post(served.url + CHAT, content=iter([long[:1000], long[1000:]]))
        for answer in (announced, pieces):
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        assert httpx.post(served.url + CHAT, json={"model": "base", "messages": HELLO}).status_code == 200


def test_a_body_that_does_not_come_is_given_up() -> None:
    with server(scripted(), settings=small(body_timeout_s=0.05)) as served, _connect(served) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
        assert b"408" in raw.recv(4096)


def test_a_key_is_asked_of_every_client_but_of_those_who_watch_health() -> None:
    with server(scripted(), key="secret") as served:
        for key in ("wrong", "secret2", "sécret"):
            headers = {"authorization": f"Bearer {key}".encode()}
            answer = httpx.post(served.url + CHAT, json={"model": "base", "messages": HELLO}, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{served.url}/metrics").status_code == 401
        for path in ("/health", "/ready", "/"):
            assert httpx.get(served.url + path).status_code == 200
        right = openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret")
        assert right.chat.completions.create(model="base", messages=HELLO).choices[0].message.content == "one two three"
        # A server with a key may be reached under any name.
        named = {"authorization": "Bearer secret", "host": "example.org"}
        assert httpx.get(f"{served.url}/v1/models", headers=named).status_code == 200


@pytest.mark.parametrize("headers", [{"host": "example.org"}, {"origin": "https://example.org"}])
def test_pages_of_others_cannot_use_a_server_without_a_key(served: Served, headers: dict[str, str]) -> None:
    assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 403


# --- clients that go away, hang, or come in crowds --------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_ask_along(stream: bool) -> None:
    gate = Gate()
    with server(gate) as served:
        with _connect(served) as raw:
            body = json.dumps({"model": "base", "messages": HELLO, "stream": stream}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            assert gate.arrived.acquire(timeout=10)
        assert gate.cancelled.acquire(timeout=10)


def test_ten_times_more_clients_than_the_queue_holds() -> None:
    gate = Gate()
    with server(gate, settings=small(requests_inside=2, requests_waiting=2)) as served:
        statuses: list[int] = []
        refused = threading.Semaphore(0)

        def ask() -> None:
            answer = httpx.post(served.url + CHAT, json={"model": "base", "messages": HELLO}, timeout=30)
            statuses.append(answer.status_code)
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["error"]["code"] == "queue_full"
                refused.release()

        clients = [threading.Thread(target=ask) for _ in range(40)]
        for thread in clients:
            thread.start()
        for _ in range(36):
            assert refused.acquire(timeout=30)
        assert "metier_requests_waiting 2.0" in httpx.get(f"{served.url}/metrics").text
        gate.open()
        for thread in clients:
            thread.join(30)
        assert sorted(statuses) == [200] * 4 + [429] * 36
        assert httpx.post(served.url + CHAT, json={"model": "base", "messages": HELLO}).status_code == 200


def test_a_client_that_never_reads_is_let_go_and_its_ask_ends() -> None:
    backend = Chatter()
    with server(backend, settings=small(write_timeout_s=0.2)) as served, _connect(served) as raw:
        body = json.dumps({"model": "base", "messages": HELLO, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert backend.cancelled.acquire(timeout=20)
        assert httpx.get(f"{served.url}/health").status_code == 200


class Chatter:
    """A backend that goes on until it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = threading.Semaphore(0)

    async def reply(self, ask: Ask, *, on_text: Any = None) -> Any:
        """Write more than the sockets between us hold, and more."""
        try:
            while True:
                on_text("word " * 20_000)
                await anyio.lowlevel.checkpoint()
        except BaseException:
            self.cancelled.release()
            raise


def test_a_request_is_given_up_after_its_time() -> None:
    with server(Gate(), settings=small(request_timeout_s=0.05)) as served:
        answer = httpx.post(served.url + CHAT, json={"model": "base", "messages": HELLO})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "request_timeout"


def test_stopping_lets_what_is_inside_end_and_nobody_in() -> None:
    gate = Gate()
    with server(gate, settings=small(drain_s=20.0)) as served:
        answers: list[int] = []
        inside = threading.Thread(
            target=lambda: answers.append(
                httpx.post(served.url + CHAT, json={"model": "base", "messages": HELLO}, timeout=30).status_code
            )
        )
        inside.start()
        with httpx.Client(base_url=served.url) as kept:
            assert kept.get("/ready").status_code == 200
            assert gate.arrived.acquire(timeout=10)
            served.app.drain()
            stopping = kept.get("/ready")
            assert stopping.status_code == 503
            late = kept.post(CHAT, json={"model": "base", "messages": HELLO})
            assert late.status_code == 503 and late.json()["error"]["code"] == "server_stopping"
            assert "retry-after" in late.headers
        served.stop()
        gate.open()
        inside.join(20)
        assert answers == [200]


def _connect(served: Served) -> socket.socket:
    host, _, port = served.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)
