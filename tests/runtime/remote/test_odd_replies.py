"""Whatever a server answers, over a real socket, is a reply or a named error of that ask."""

from __future__ import annotations

import gzip
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from metier.agents import Ask, Message
from metier.agents.errors import EngineDeadError, EngineError
from metier.runtime.remote.fleet import Fleet
from metier.runtime.remote.remote_backend import RemoteBackend
from metier.runtime.remote.server_calls import GarbledAnswerError
from metier.runtime.settings.fleet import FleetSettings, RemoteSettings

pytestmark = pytest.mark.anyio

MODELS = {"data": [{"id": "tiny", "owned_by": "vllm", "parent": None}]}
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
WHOLE = {"choices": [{"message": {"content": "four", "reasoning": "2 and 2"}, "finish_reason": "stop"}], "usage": USAGE}
PIECE = {"choices": [{"delta": {"content": "four"}, "finish_reason": "stop"}], "usage": USAGE}
BOUNDS = RemoteSettings(retries=0, answer_bytes=1 << 16, answer_timeout_s=5.0)
ODD = [
    "null", "[]", "{}", "0", "-1", "1e999", "NaN", "9223372036854775808", "1" * 4301, '"\\ud800"', '"x"', "true",
    "[[1]]", '[{"message": null}]', "[" * 900 + "]" * 900, "[" * 100_000, '{"a": 1}', "\x00", "\xff", "", '"',
]  # fmt: skip


class Answers:
    """A server that gives one raw HTTP answer to asks, and another to /v1/models."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.chat = self.models = b""
        self.drip = threading.Event()


def http(body: bytes, *headers: str, kind: str = "application/json", status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}", "connection: close"]
    return "\r\n".join([*lines, *headers]).encode() + b"\r\n\r\n" + body


def stream(*pieces: str) -> bytes:
    return http("".join(f"data: {piece}\n\n" for piece in pieces).encode("latin-1"), kind="text/event-stream")


@contextmanager
def answering() -> Iterator[Answers]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._give(answers.models if "models" in self.path else http(b"{}"))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._give(answers.chat)

        def _give(self, raw: bytes) -> None:
            self.close_connection = True
            try:
                self.wfile.write(raw)
                while answers.drip.is_set():  # as much of it as the client takes
                    self.wfile.write(b" ")
            except (BrokenPipeError, ConnectionResetError):
                pass

        def log_message(self, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    answers = Answers(f"http://127.0.0.1:{httpd.server_port}")
    answers.models = http(json.dumps(MODELS).encode())
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield answers
    finally:
        answers.drip.clear()
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def ask() -> Ask:
    return Ask(run_id="run", step_path="solve", role="solver", messages=(Message(role="user", content="2 + 2"),))


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


def put(data: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    copy = data.copy()
    copy[at[0]] = put(data[at[0]], at[1:], value)
    return copy


def mutated(chance: random.Random, data: Any) -> str:
    text = json.dumps(put(data, chance.choice(places(data)), "-here-")).replace('"-here-"', chance.choice(ODD), 1)
    if chance.random() < 0.2:
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(["", "\xfe", "}", '"', text[:9]]) + text[at + chance.randrange(3) :]
    return text


def odd_answer(chance: random.Random, data: Any, streamed: bool) -> bytes:
    text = mutated(chance, data)
    raw = stream(text, "[DONE]") if streamed else http(text.encode("latin-1"))
    if chance.random() < 0.1:
        packed = gzip.compress(text.encode("latin-1"))
        raw = http(chance.choice([packed, packed[:-3], b"gz" + packed]), "content-encoding: gzip")
    if chance.random() < 0.15:  # the bytes of HTTP itself
        at = chance.randrange(len(raw))
        raw = raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :]
    return raw[: chance.randrange(len(raw))] if chance.random() < 0.05 else raw


async def check_corpus(seed: int, count: int) -> None:
    chance = random.Random(seed)
    ended = {"reply": 0, "error": 0}
    with answering() as answers:
        async with RemoteBackend(answers.url, settings=BOUNDS) as remote:
            for _ in range(count):
                streamed, models = chance.random() < 0.5, chance.random() < 0.2
                answers.models = odd_answer(chance, MODELS, False) if models else http(json.dumps(MODELS).encode())
                answers.chat = odd_answer(chance, PIECE if streamed else WHOLE, streamed)
                remote.forget()
                try:
                    reply = await remote.reply(ask(), on_text=(lambda text: None) if streamed else None)
                    reply.model_dump_json().encode()
                    assert 0 <= reply.usage.prompt_tokens < 2**63
                    ended["reply"] += 1
                except EngineError as error:
                    str(error).encode()
                    ended["error"] += 1
    assert min(ended.values()) > count // 20, ended


async def test_mutated_replies_are_replies_or_named_errors() -> None:
    await check_corpus(1, 200)


@pytest.mark.faults
async def test_a_thousand_mutated_replies_are_replies_or_named_errors() -> None:
    await check_corpus(2, 1000)


BOMB = http(gzip.compress(b" " * (100 << 20)), "content-encoding: gzip")


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (BOMB, "more than remote.answer_bytes=65536"),
        (http(b'"' + b"a" * (1 << 17) + b'"'), "more than remote.answer_bytes=65536"),
        (http(b"no gzip", "content-encoding: gzip"), "packed its answer .* wrongly"),
        (http(gzip.compress(b"{}")[:-4], "content-encoding: gzip"), "wrongly: it ends early"),
        (http(b"x", "content-encoding: br"), "packed its answer .* as: br"),
        (http(b'{"choices": null}'), "no chat completion"),
        (http(json.dumps(put(WHOLE, ("choices", 0, "message", "content"), 7)).encode()), "no chat completion"),
        (http(json.dumps(put(WHOLE, ("usage", "prompt_tokens"), 2**63)).encode()), "no chat completion"),
        (http(json.dumps(put(WHOLE, ("choices", 0, "message", "content"), "\ud800")).encode()), "no JSON"),
        (http(b"[" * 50_000), "no JSON"),
        (http(b"<html>", kind="text/html"), "no chat completion"),
    ],
)
async def test_what_is_no_reply_is_said(chat: bytes, said: str) -> None:
    with answering() as answers:
        answers.chat = chat
        async with RemoteBackend(answers.url, settings=BOUNDS) as remote:
            with pytest.raises(GarbledAnswerError, match=said):
                await remote.reply(ask())


@pytest.mark.parametrize("models", ['{"data": [1]}', '{"data": [{}]}', '{"data": [{"id": 5}]}', '{"data": "x"}', "[]"])
async def test_what_is_no_list_of_models_is_said(models: str) -> None:
    with answering() as answers:
        answers.models = http(models.encode())
        async with RemoteBackend(answers.url, settings=BOUNDS) as remote:
            with pytest.raises(EngineError, match="/v1/models"):
                await remote.reply(ask())


async def test_an_answer_that_never_ends_is_given_up() -> None:
    settings = RemoteSettings(retries=0, answer_timeout_s=0.3, answer_bytes=1 << 40)
    with answering() as answers:
        answers.drip.set()
        answers.models = http(b"")[:-4].replace(b"content-length: 0\r\n", b"") + b"\r\n\r\n"
        async with RemoteBackend(answers.url, settings=settings) as remote:
            with pytest.raises(EngineDeadError, match=r"did not end its answer within remote.answer_timeout_s=0\.3"):
                await remote.reply(ask())


async def test_a_server_of_a_fleet_that_answers_garbage_is_left_alone() -> None:
    with answering() as good, answering() as bad:
        good.chat, bad.chat = http(json.dumps(WHOLE).encode()), http(b'{"choices": null}')
        settings = FleetSettings(failures_to_open=2, open_s=1000.0).of([bad.url, good.url])
        async with Fleet(settings, remote=BOUNDS) as fleet:
            for _ in range(6):
                assert (await fleet.reply(ask())).text == "four"
            assert fleet.totals()[bad.url]["failed_asks"] <= 2
