"""Requests as bytes: whole ones for every endpoint, and a seeded generator of what may become of them on their way."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse
from typing import Any

ODD_VALUES = [
    "NaN", "-Infinity", "1e999", "-1e400", "1" * 4301, "1" * 400, "9223372036854775808", "-1", "0.5", "null", "true",
    '""', '"\\ud800"', '"x\\udfffy"', '"\\u0000"', '"\\ud83d\\ude00"', "[]", "{}", "[" * 900 + "]" * 900,
    '{"a":' * 300 + "1" + "}" * 300, "[" * 50_000, '{"\\udc00": 1}', '"NaN"', '"1e999"', '{"f": "inf"}',
    '"' + "a" * 5000 + '"',
    '{"text": NaN}', '"{\\"text\\": \\"\\\\ud800\\"}"', '"{\\"f\\": NaN}"', "01", "'", "\x00", "\xff", "",
]  # fmt: skip
"""JSON texts, or nearly, that stand where a value stood."""

ODD_HEADERS = [
    b"Content-Length: -1", b"Content-Length: 1e3", b"Content-Length: 99999999999999999999",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked", b"Expect: 100-continue", b"Connection: close", b"Upgrade: websocket",
    b"Connection: upgrade\r\nUpgrade: h2c", b"Content-Type: text/plain", b"Content-Type: \xff", b"Origin: null",
    b"Host: evil.example", b"Host: [::1", b"Authorization: Bearer \xe9", b"Last-Event-ID: 9999999999999999999999",
    b": nothing", b"No colon", b"X: " + b"a" * 70_000, b"Content-Encoding: gzip", b"Accept: \x01", b" folded: 1",
]  # fmt: skip

SAMPLED = {
    "temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 2, "stop": ["x", "y"], "logprobs": True, "top_logprobs": 2,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "min_p": 0.1,
    "logit_bias": {"7": 1.5},
    "reasoning_effort": "low",
}  # fmt: skip
SENT_BACK = {
    "role": "assistant", "content": [{"type": "text", "text": "there", "annotations": []}], "refusal": None,
    "annotations": [], "audio": None, "function_call": None, "tool_calls": [], "reasoning_content": "hm",
}  # fmt: skip


def whole_requests() -> list[tuple[str, str, Any]]:
    """(method, path, body or None) of requests that are answered with what they ask for, or with a 404."""
    say = [{"role": "user", "content": "2 + 2"}]
    loose = {"data": [1, {"a": None}], "f": 0.5, "named": {"a": 1.5}}
    chat, responses, runs = "/v1/chat/completions", "/v1/responses", "/v1/runs"
    schema = {"name": "answer", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}}}
    format = {"type": "json_schema", "json_schema": schema}
    return [
        ("POST", runs, {"workflow": "chain", "input": {"text": "2 cows"}, "seed": 3, "max_seconds": 9.5}),
        ("POST", runs, {"workflow": "loose", "input": loose, "max_tokens": 100}),
        ("POST", runs, {"workflow": "loose", "input": json.dumps(loose)}),
        ("POST", chat, {"model": "chain", "messages": say}),
        ("POST", chat, {"model": "loose", "messages": [{"role": "user", "content": json.dumps(loose)}], "seed": 1}),
        ("POST", chat, {"model": "planner", "messages": say, "temperature": 0.5, "thinking": {"max_tokens": 8}}),
        ("POST", chat, {"model": "base", "messages": say, "stream": True, "response_format": format}),
        ("POST", chat, {"model": "base", "messages": say, "priority": 2, "metier": {"round": 2, "task": "t"}}),
        ("POST", chat, {"model": "base", "messages": say, **SAMPLED}),
        ("POST", chat, {"model": "base", "messages": say, "stream": True, "n": 3, "stop": "x", "top_k": 3}),
        ("POST", chat, {"model": "base", "messages": [*say, SENT_BACK, *say], "user": "u", "store": True}),
        ("POST", responses, {"model": "base", "input": "hello", "include": ["message.output_text.logprobs"],
                             "reasoning": {"effort": "high", "summary": "auto"}, "top_logprobs": 1}),
        ("POST", "/v1/completions", {"model": "base", "prompt": "nobody"}),
        ("POST", responses, {"model": "base", "input": "hello", "max_output_tokens": 8, "metadata": {"a": "b"}}),
        ("POST", responses, {"model": "chain", "input": [{"role": "user", "content": "2"}], "stream": True}),
        ("POST", f"{runs}/nobody/resume", {"answers": {"ask[1]": {"text": "x"}}}),
        ("POST", f"{runs}/nobody/cancel", None),
        ("GET", f"{runs}?limit=5", None),
        ("GET", f"{runs}/nobody", None),
        ("GET", f"{runs}/nobody/events?after=3&text=true", None),
        ("GET", "/v1/events?after=0", None),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/chain", None),
        ("GET", "/v1/state", None),
        ("GET", "/metrics", None),
        ("GET", "/ready", None),
    ]  # fmt: skip


def written(method: str, path: str, body: bytes, *headers: bytes) -> bytes:
    """A request as it travels."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", *headers]
    if body:
        lines += [b"Content-Type: application/json", f"Content-Length: {len(body)}".encode()]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def mutated_requests(seed: int, count: int) -> Iterator[bytes]:
    """Requests of which something is odd: a value, a field, a header, some bytes, their framing, or several of them."""
    chance = random.Random(seed)
    whole = whole_requests()
    for _ in range(count):
        method, path, data = chance.choice(whole)
        body = b"" if data is None else _odd_body(chance, data)
        if chance.random() < 0.1:
            method = chance.choice(["PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT", "PATCH", "TRACE", "get", "PRI"])
        if chance.random() < 0.15:
            odd_paths = [
                "/%ff%00",
                "*",
                "//",
                "http://a:99999/",
                "/v1/runs/%ed%a0%80",
                "/" + "a" * 70_000,
                "/?limit=-1",
            ]
            path = chance.choice([*odd_paths, path + "/%2e%2e", path.replace("=", "=%00")])
        odd_headers = chance.sample(ODD_HEADERS, chance.choice([0, 0, 0, 1, 2]))
        request = written(method, path, body, *odd_headers)
        for _ in range(chance.choice([0, 0, 0, 1, 3])):
            request = chance.choice(BYTES)(chance, request)
        yield request


def answer_to(address: tuple[str, int], request: bytes, timeout_s: float = 20.0) -> tuple[int, bytes] | None:
    """Status and body of the answer, None where the connection was closed without one; of a stream its beginning."""
    with socket.create_connection(address, timeout=timeout_s) as sock:
        try:
            sock.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before it had read all; the answer may be there
        response = HTTPResponse(sock, method="HEAD" if request.startswith(b"HEAD ") else None)
        try:
            response.begin()
            if response.getheader("content-type", "").startswith("text/event-stream"):
                return response.status, b""
            return response.status, response.read()
        except (HTTPException, ConnectionResetError) as error:
            assert not isinstance(error, TimeoutError)
            return None
        finally:
            response.close()


def _odd_body(chance: random.Random, data: Any) -> bytes:
    """The JSON of a body, with odd values at some places."""
    marks = chance.choice([0, 1, 1, 1, 2])
    text = json.dumps(data)
    for _ in range(marks):
        places = [at for at in _places(data) if at]
        where = chance.choice(places)
        text = json.dumps(_put(data, where, MARK)).replace(json.dumps(MARK), chance.choice(ODD_VALUES), 1)
    if chance.random() < 0.1:
        text = chance.choice(ODD_VALUES)
    return text.encode("utf-16" if chance.random() < 0.03 else "latin-1")


MARK = "-here-"


def _places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(place for key, value in inner for place in _places(value, (*at, key)))]


def _put(data: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    key, *rest = at
    if isinstance(data, list):
        return [_put(one, tuple(rest), value) if index == key else one for index, one in enumerate(data)]
    return {name: _put(one, tuple(rest), value) if name == key else one for name, one in data.items()}


def _flip(chance: random.Random, request: bytes) -> bytes:
    at = chance.randrange(len(request))
    return request[:at] + bytes([chance.randrange(256)]) + request[at + 1 :]


def _cut_out(chance: random.Random, request: bytes) -> bytes:
    at = chance.randrange(len(request))
    return request[:at] + request[at + chance.randrange(1, 20) :] or b"\r\n"


def _repeat(chance: random.Random, request: bytes) -> bytes:
    at = chance.randrange(len(request))
    return request[:at] + request[at : at + 30] * chance.choice([2, 5, 3000]) + request[at:]


def _end_early(chance: random.Random, request: bytes) -> bytes:
    return request[: chance.randrange(1, len(request) + 1)]


def _twice(chance: random.Random, request: bytes) -> bytes:
    return request + request


BYTES: list[Callable[[random.Random, bytes], bytes]] = [_flip, _flip, _cut_out, _repeat, _end_early, _twice]
