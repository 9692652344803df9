"""Sampling as clients ask for it: on its way to the backend, through a server of servers, and what is told back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from metier.agents import Ask, Message, Sampling, ScriptedBackend, ThinkingProfile
from metier.runtime.remote.remote_backend import RemoteBackend
from metier.runtime.server.unserved_endpoints import UNSERVED_ENDPOINTS
from tests.runtime.served import Served, scripted, server

HELLO: Any = [{"role": "user", "content": "2 cows"}]
LOOK: Any = {"type": "function", "function": {"name": "look"}}


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return scripted()


@pytest.fixture(scope="module")
def served(backend: ScriptedBackend) -> Iterator[Served]:
    with server(backend) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def test_everything_a_client_says_of_sampling_reaches_the_backend(
    client: openai.OpenAI, backend: ScriptedBackend
) -> None:
    client.chat.completions.create(
        model="base",
        messages=HELLO,
        temperature=0.7,
        top_p=0.0,
        seed=5,
        stop=["\n", ""],
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"7": -100},
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
    )
    ask = backend.asks[-1]
    assert (ask.temperature, ask.top_p, ask.seed) == (0.7, 1e-6, 5)
    assert ask.sampling == Sampling(
        stop=("\n",),
        top_k=20,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        logit_bias={7: -100.0},
        logprobs=2,
    )


def test_what_says_nothing_changes_nothing(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    nothing: Any = {"stop": [], "logit_bias": {}, "n": 1, "logprobs": False, "presence_penalty": 0, "seed": -1}
    client.chat.completions.create(model="base", messages=HELLO, extra_body=nothing | {"top_k": -1, "max_tokens": -1})
    assert backend.asks[-1].sampling == Sampling() and backend.asks[-1].seed is None
    assert client.chat.completions.create(model="chain", messages=HELLO, extra_body=nothing | {"top_p": 1}).choices


def test_an_answer_ends_before_a_text_that_stops_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="base", messages=HELLO, stop="two")
    pieces = list(client.chat.completions.create(model="base", messages=HELLO, stop=["three", "two"], stream=True))
    assert whole.choices[0].message.content == "one " and whole.choices[0].finish_reason == "stop"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "one "


def test_beside_tools_the_answer_is_stopped_and_not_the_json_around_it() -> None:
    with server(ScriptedBackend(default=lambda ask: '"say \\"two\\", three"')) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")
        reply = client.chat.completions.create(model="base", messages=HELLO, tools=[LOOK], stop='",')
        assert reply.choices[0].message.content == 'say "two' and reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_have_the_seeds_after_the_first(stream: bool) -> None:
    backend = ScriptedBackend(default=lambda ask: f"seed {ask.seed}")
    with server(backend) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")
        asked: Any = {"model": "base", "messages": HELLO, "n": 3, "seed": 5, "temperature": 1}
        texts = {}
        if stream:
            texts = {0: "", 1: "", 2: ""}
            pieces = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
            for piece in pieces:
                for each in piece.choices:
                    texts[each.index] += each.delta.content or ""
            usage = pieces[-1].usage
            ends = [each.index for piece in pieces for each in piece.choices if each.finish_reason]
            assert sorted(ends) == [0, 1, 2]
        else:
            reply = client.chat.completions.create(**asked)
            texts, usage = {each.index: each.message.content or "" for each in reply.choices}, reply.usage
        assert texts == {0: "seed 5", 1: "seed 6", 2: "seed 7"}
        assert usage is not None and usage.prompt_tokens == 2 and usage.completion_tokens == 6
        measured: Any = usage.model_dump()["metier"]
        assert measured["prompt_tokens"] == 6, "what was measured counts each"


def test_an_error_of_one_answer_is_that_of_the_request() -> None:
    def fail(ask: Ask) -> str:
        raise ZeroDivisionError

    with server(ScriptedBackend(default=fail)) as served:
        asked = {"model": "base", "messages": HELLO, "n": 2}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=asked)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"


def test_tokens_are_told_in_chats_streams_and_responses(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="base", messages=HELLO, logprobs=True)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None and [one.token for one in content] == ["one ", "two ", "three"]
    assert content[0].bytes == list(b"one ") and content[0].top_logprobs == []
    pieces = list(client.chat.completions.create(model="base", messages=HELLO, logprobs=True, stream=True))
    told = [piece.choices[0].logprobs.content for piece in pieces if piece.choices[0].logprobs]
    assert told == [content]
    response = client.responses.create(model="base", input="hi", include=["message.output_text.logprobs"])
    message: Any = response.output[0]
    assert [one.token for one in message.content[0].logprobs] == ["one ", "two ", "three"]
    assert client.chat.completions.create(model="base", messages=HELLO).choices[0].logprobs is None


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": "low"}, 128),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, 512),
        ({"reasoning": {"max_tokens": 40}, "reasoning_effort": "low"}, 40),
        ({"reasoning": {"enabled": True}}, 256),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 0),
        ({"thinking": 7, "reasoning_effort": "max"}, 7),
        ({"reasoning_effort": None, "reasoning": {"effort": None}}, None),
    ],
)
def test_efforts_are_budgets_of_thinking(
    client: openai.OpenAI, backend: ScriptedBackend, said: Any, tokens: int | None
) -> None:
    expected = None if tokens is None else ThinkingProfile(max_tokens=tokens)
    client.chat.completions.create(model="base", messages=HELLO, extra_body=said)
    assert backend.asks[-1].thinking == expected
    if "reasoning" in said and "reasoning_effort" not in said:
        client.responses.create(model="base", input="hi", extra_body=said)
        assert backend.asks[-1].thinking == expected


@pytest.mark.anyio
async def test_a_server_of_servers_passes_all_of_it_on(served: Served, backend: ScriptedBackend) -> None:
    sampling = Sampling(stop=("three",), top_k=3, min_p=0.1, logit_bias={3: 1.5}, logprobs=1, frequency_penalty=0.5)
    question = Message(role="user", content="hi")
    ask = Ask(run_id="r", step_path="s", role="", messages=(question,), temperature=0.5, seed=3, sampling=sampling)
    async with RemoteBackend(served.url) as remote:
        whole = await remote.reply(ask)
        pieces: list[str] = []
        streamed = await remote.reply(ask, on_text=pieces.append)
    assert backend.asks[-1].sampling == backend.asks[-2].sampling == sampling
    for reply in (whole, streamed):
        assert reply.text == "one two " and reply.logprobs is not None
        assert [token.token for token in reply.logprobs] == ["one ", "two "]
    assert "".join(pieces) == "one two "


@pytest.mark.parametrize("path", UNSERVED_ENDPOINTS)
def test_endpoints_that_are_not_served_say_why(served: Served, path: str) -> None:
    answer = httpx.post(f"{served.url}{path}", json={"model": "base", "input": "hi"})
    error = answer.json()["error"]
    assert answer.status_code == 404 and error["code"] == "unsupported_endpoint"
    assert UNSERVED_ENDPOINTS[path][0] in error["message"]
