"""The server on a real engine: OpenAI's client, adapters, schemas, and tokens that equal the engine's own counters."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from pydantic import BaseModel
from transformers import AutoTokenizer

from metier.agents import PROMPT_LAYOUT, Role, TaskGraph
from metier.router import Assignment, RoleAssignment
from metier.runtime import load_settings
from metier.runtime.server.served_models import ServedWorkflow
from metier.specializers.shelf.base_model import base_fingerprint
from metier.specializers.shelf.shelf import Shelf
from metier.specializers.shelf.variant import AskSpec, EngineSpec
from tests.runtime.served import Served, server
from tests.runtime.server.client_bodies import CHAT_BODIES, Sent
from tests.tiny_model import write_random_lora

pytestmark = pytest.mark.engine


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    ready: bool


class Verdict(BaseModel):
    correct: bool


planner = Role("planner", takes=Puzzle, gives=Plan, max_tokens=64)
critic = Role("critic", takes=Plan, gives=Verdict, max_tokens=64)
graph = TaskGraph("tiny-team", takes=Puzzle, gives=Verdict)
graph.step(critic, after=graph.step(planner))

PART = "\N{REPLACEMENT CHARACTER}"
"""Stands for a token that holds part of a character."""

HELLO: Any = [{"role": "user", "content": "Add 12 and 7."}]


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose critic plays on an adapter."""
    root = tmp_path_factory.mktemp("served")
    base = base_fingerprint(tiny_base)
    write_random_lora(root / "staged" / "adapter", tiny_base, rank=8, seed=1)
    record = {
        "base": base, "prompt_layout": PROMPT_LAYOUT,
        "engine": EngineSpec(base=base).model_dump(), "ask": AskSpec(adapter="lora", rank=8).model_dump(),
    }  # fmt: skip
    Shelf(root / "shelf").add(root / "staged", name="checker", record=record)
    tiny = {
        "eager": True,
        "kv_cache_mib": 64,
        "max_model_tokens": 512,
        "threads": 1,
        "slot_rank": 8,
        "dtype": "float32",
    }
    overrides = {f"engine.{name}": value for name, value in tiny.items()} | {"shelf": root / "shelf"}
    settings = load_settings(overrides=overrides | {"server.drain_s": 2.0})
    assignment = Assignment(roles={"critic": RoleAssignment(variant="checker")})
    workflows = [ServedWorkflow(graph.build())]
    with server(settings=settings, assignment=assignment, workflows=workflows, base=tiny_base) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def test_roles_and_variants_answer_and_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    verdict = client.chat.completions.create(model="critic", messages=[{"role": "user", "content": '{"ready": true}'}])
    assert isinstance(json.loads(verdict.choices[0].message.content or "")["correct"], bool)
    texts = {}
    for model in ("base", "checker"):
        whole = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12)
        pieces = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12, stream=True)
        texts[model] = whole.choices[0].message.content
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == texts[model]
        assert whole.choices[0].finish_reason == "length" and whole.usage and whole.usage.completion_tokens == 12
    assert texts["base"] != texts["checker"]


def test_an_ask_the_engine_refuses_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "word " * 2000}])
    bad: Any = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError, match="schema|grammar|type"):
        client.chat.completions.create(model="base", messages=HELLO, response_format=bad)


def test_sampling_is_done_by_the_engine(client: openai.OpenAI, tiny_base: Path) -> None:
    def say(**fields: Any) -> Any:
        known = {"model": "base", "messages": HELLO, "max_tokens": 12}
        return client.chat.completions.create(**known | {"extra_body": fields.pop("ours", None)} | fields)

    def joined(tokens: Any) -> str:
        return "".join(token.token for token in tokens).replace(PART, "")

    plain = say(logprobs=True, top_logprobs=3).choices[0]
    text, tokens = plain.message.content, plain.logprobs.content
    assert joined(tokens) == text.replace(PART, "") and len(tokens) == 12
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.logprob == max(each.logprob for each in token.top_logprobs) <= 0 for token in tokens)

    (words,) = re.findall(r"[a-zA-Z ]{3,}", text)[:1]
    stop = words[1:]
    before = text[: text.index(stop)]
    stopped = say(stop=["never said", stop], logprobs=True).choices[0]
    assert stopped.message.content == before and stopped.finish_reason == "stop"
    assert joined(stopped.logprobs.content).startswith(before.replace(PART, ""))
    assert len(stopped.logprobs.content) < 12
    assert "".join(piece.choices[0].delta.content or "" for piece in say(stop=stop, stream=True)) == before
    thinks = say(stop=stop, reasoning_effort="minimal", max_tokens=40).choices[0]
    assert thinks.message.reasoning_content and stop not in thinks.message.content

    assert say(temperature=2, seed=1, ours={"top_k": 1}).choices[0].message.content == text
    assert say(temperature=2, seed=1, top_p=0).choices[0].message.content == text
    assert say(temperature=2, seed=1, ours={"min_p": 1}).choices[0].message.content == text
    drawn, again = (say(temperature=2, seed=7, n=3) for _ in range(2))
    texts = [choice.message.content for choice in drawn.choices]
    assert len(set(texts)) == 3 and texts == [choice.message.content for choice in again.choices]
    assert drawn.usage.completion_tokens == again.usage.completion_tokens > 12

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    first = next(id for id in range(len(tokenizer)) if tokenizer.decode([id]) == tokens[0].token)
    biased = say(logit_bias={str(first): -100}, logprobs=True).choices[0].logprobs.content
    assert biased[0].token != tokens[0].token
    assert biased[0].logprob <= tokens[0].logprob, "told before any bias"
    assert set(say(logit_bias={str(first): 100}).choices[0].message.content) == set(tokens[0].token)

    def changes(bias: float, **penalty: float) -> bool:
        """Whether a penalty keeps a token that is likely by its bias from being written again and again."""
        written = [say(logit_bias={str(first): bias}, ours=ours).choices[0].message.content for ours in ({}, penalty)]
        return written[0] != written[1]

    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 10}):
        assert any(changes(bias, **penalty) for bias in (0.5, 1, 1.5, 2, 3, 4, 6, 8)), penalty
    with pytest.raises(openai.BadRequestError, match="99999999"):
        say(logit_bias={"99999999": 1})


@pytest.mark.parametrize("sent", [*CHAT_BODIES[4:6], *CHAT_BODIES[34:37]], ids=lambda sent: sent.client)
def test_bodies_of_clients_are_served_by_the_engine(served: Served, sent: Sent) -> None:
    body = {"max_tokens": 40, **sent.body, "model": "base"}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200 and len(answer.json()["choices"]) == sent.body.get("n", 1), answer.text


def test_a_response_goes_on_from_another_until_the_context_ends(client: openai.OpenAI) -> None:
    first = client.responses.create(model="base", input="Add 12 and 7. " * 8, max_output_tokens=12)
    second = client.responses.create(model="base", input="And 8?", previous_response_id=first.id, max_output_tokens=12)
    assert first.usage is not None and second.usage is not None
    block = 16
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - block
    with pytest.raises(openai.BadRequestError, match="fewer than 512, the engine's context") as error:
        client.responses.create(model="base", input="word " * 450, previous_response_id=second.id)
    assert error.value.code == "context_length_exceeded"


def test_a_client_that_leaves_aborts_its_ask_and_the_sums_are_the_engines(
    client: openai.OpenAI, served: Served
) -> None:
    def ask() -> None:
        client.chat.completions.create(model="tiny-team", messages=HELLO)

    crowd = [threading.Thread(target=ask) for _ in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    figures = _figures(served)
    told = sum(
        value
        for name, value in figures.items()
        if name.startswith("metier_tokens_total") and 'kind="cached"' not in name
    )
    cached = sum(v for name, v in figures.items() if name.startswith("metier_tokens_total") and 'kind="cached"' in name)
    engine = {name: value for name, value in figures.items() if name.startswith("metier_engine_")}
    asks = sum(value for name, value in figures.items() if name.startswith("metier_asks_total"))
    computed = engine['metier_engine_prefill_tokens_total{engine="base"}']
    written = engine['metier_engine_decode_tokens_total{engine="base"}']
    assert engine['metier_engine_asks_total{engine="base"}'] == asks
    # Of an ask's written tokens the first comes with its prefill, and the last is never computed on.
    assert told - cached - asks == computed + written
    assert "vllm:" in httpx.get(f"{served.url}/metrics").text

    with client.chat.completions.create(model="base", messages=HELLO, max_tokens=400, stream=True) as pieces:
        next(iter(pieces))
    assert [row["answer_tokens"] < 400 for row in given_up(served, 1)] == [True]


def test_a_client_that_leaves_before_its_whole_answer_aborts_its_ask_too(client: openai.OpenAI, served: Served) -> None:
    before = len(given_up(served, 0))
    body = json.dumps({"model": "checker", "messages": HELLO, "max_tokens": 400}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    parts = urlsplit(served.url)
    assert parts.hostname and parts.port
    with socket.create_connection((parts.hostname, parts.port)) as leaving:
        leaving.sendall(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        # Another answer, whole: meanwhile the engine has worked on the first one.
        for _ in range(3):
            client.chat.completions.create(model="base", messages=HELLO, max_tokens=12)
    lost = given_up(served, before + 1)[-1]
    assert 0 < lost["answer_tokens"] < 400 and lost["cpu_s"] > 0 and lost["variant"] == "checker"
    # What the engine has computed is all on somebody's account.
    figures = _figures(served)
    charged = sum(value for name, value in figures.items() if name.startswith("metier_ask_cpu_seconds_total"))
    charged += served.store.query("SELECT sum(cpu_s) AS s FROM abandoned")[0]["s"]
    charged += figures['metier_engine_overhead_cpu_s_total{engine="base"}']
    assert charged == pytest.approx(figures['metier_engine_cpu_s_total{engine="base"}'], rel=0.02)


def given_up(served: Served, at_least: int) -> list[Any]:
    """What asks had used whose clients have left, once there are so many."""
    cut_off = "SELECT answer_tokens, cpu_s, variant FROM abandoned WHERE answer_tokens > 0"
    while len(rows := served.store.query(cut_off)) < at_least:
        pass
    return rows


def _figures(served: Served) -> dict[str, float]:
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    rows = (line.rsplit(" ", 1) for line in lines if line.startswith("metier_"))
    return {name: float(value) for name, value in rows}
