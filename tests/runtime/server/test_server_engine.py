"""The server on a real engine: OpenAI's client, adapters, schemas, and tokens that equal the engine's own counters."""

from __future__ import annotations

import json
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

from metier.agents import PROMPT_LAYOUT, Role, TaskGraph
from metier.router import Assignment, RoleAssignment
from metier.runtime import load_settings
from metier.runtime.server.served_models import ServedWorkflow
from metier.specializers.shelf.base_model import base_fingerprint
from metier.specializers.shelf.shelf import Shelf
from metier.specializers.shelf.variant import AskSpec, EngineSpec
from tests.runtime.served import Served, server
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
    tiny = {"eager": True, "kv_cache_mib": 64, "max_model_tokens": 512, "threads": 1, "slot_rank": 8}
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
