"""Connections are bounded: the size and time of headers, how many there are, and how long a client may dawdle."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from metier.agents import ScriptedBackend
from metier.runtime.settings.session import load_settings
from tests.runtime.served import Gate, Served, scripted, server

PATIENCE_S = 30.0
START = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
CHAT = {"model": "base", "messages": [{"role": "user", "content": "2 + 2"}]}


@contextmanager
def bounded(backend: Any = None, **limits: Any) -> Iterator[Served]:
    overrides = {f"server.{name}": value for name, value in ({"drain_s": 1.0} | limits).items()}
    with server(backend or scripted(), settings=load_settings(overrides=overrides)) as running:
        yield running


def connect(served: Served) -> socket.socket:
    parts = urlsplit(served.url)
    assert parts.hostname and parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S)


def refusal(sock: socket.socket) -> tuple[int, str]:
    """Status and code of an answer that refuses, after which the server closes."""
    response = HTTPResponse(sock)
    response.begin()
    error = json.loads(response.read())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    response.close()
    assert ended(sock)
    return response.status, error["code"]


def ended(sock: socket.socket) -> bool:
    """Waits until the server has closed; what it still says is dropped."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "beginning",
    [
        START + b"X: ",
        b"GET /",
        START + b"X: y\r\n" * 20_000,
        b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nT: ",
        b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;",
    ],
)
def test_headers_without_end_are_refused_at_their_limit(beginning: bytes) -> None:
    with bounded(header_bytes=4096) as served:
        with connect(served) as sock:
            sent = 0
            try:
                sock.sendall(beginning)
                for _ in range(200):
                    sock.sendall(b"a" * (1 << 20))
                    sent += 1
            except (BrokenPipeError, ConnectionResetError):
                pass
            assert sent < 200
        with connect(served) as sock:
            sock.sendall(beginning + b"a" * 600_000)
            assert refusal(sock) == (431, "headers_too_large")
        assert httpx.get(f"{served.url}/health", headers={"x": "a" * 3000}).status_code == 200


def test_who_never_ends_its_headers_is_closed_in_the_named_time() -> None:
    with bounded(header_timeout_s=0.2) as served:
        socks = [connect(served) for _ in range(200)]
        try:
            for sock in socks[:100]:
                sock.sendall(START)
            assert refusal(socks[0]) == (408, "header_timeout")
            assert all(ended(sock) for sock in socks[1:])
        finally:
            for sock in socks:
                sock.close()
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_thousand_slow_clients_are_all_closed_and_hold_little_memory() -> None:
    """Each sends nearly as much of its headers as it may, and then nothing more."""
    count, header_bytes = 1000, 1 << 14
    limits = {"connections": count + 8, "connections_per_client": count + 8, "header_bytes": header_bytes}
    with bounded(header_timeout_s=5, idle_timeout_s=5, **limits) as served:
        httpx.get(f"{served.url}/health")
        before = resident_mib()
        with ExitStack() as slow:
            socks = [slow.enter_context(connect(served)) for _ in range(count)]
            for sock in socks:
                sock.sendall(START + b"X: " + b"a" * (header_bytes - 200))
            assert httpx.get(f"{served.url}/health", timeout=PATIENCE_S).status_code == 200
            assert all(ended(sock) for sock in socks)
        assert httpx.get(f"{served.url}/health").status_code == 200
        # Twice what was sent, and some tens of KiB for each connection, of which both ends are in this process.
        assert resident_mib() - before < 2 * count * (header_bytes + (1 << 15)) / 2**20


def test_a_header_without_end_takes_no_memory() -> None:
    with bounded() as served:
        before = resident_mib()
        with connect(served) as sock, suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(START + b"X: ")
            for _ in range(200):
                sock.sendall(b"a" * (1 << 20))
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert resident_mib() - before < 8


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss / 2**20)


def test_who_drips_after_its_answer_is_closed_too() -> None:
    with bounded(header_timeout_s=0.2, body_timeout_s=0.2) as served:
        with connect(served) as sock:  # a body that nobody reads, and that never ends
            sock.sendall(START + b"Content-Length: 100000\r\n\r\n")
            drip_until_closed(sock, b"a")
        with connect(served) as sock:  # line ends, which may stand before a request
            sock.sendall(START + b"\r\n")
            drip_until_closed(sock, b"\r\n")


def drip_until_closed(sock: socket.socket, piece: bytes) -> None:
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            sock.sendall(piece)
    assert ended(sock)


def test_a_body_that_does_not_end_is_no_request() -> None:
    body = json.dumps({"workflow": "chain", "input": {"text": "2 cows"}}).encode()
    with bounded(body_timeout_s=0.2) as served:
        head = b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        chunk = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body)
        with connect(served) as sock:
            sock.sendall(head + chunk)
            response = HTTPResponse(sock)
            response.begin()
            assert response.status == 408 and json.loads(response.read())["error"]["code"] == "body_timeout"
        with connect(served) as sock:
            sock.sendall(head + chunk)
            sock.shutdown(socket.SHUT_WR)
            assert ended(sock)
        assert httpx.get(f"{served.url}/v1/runs").json()["data"] == []


@pytest.mark.parametrize("limit", ["connections", "connections_per_client"])
def test_connections_beyond_the_limit_are_refused_until_one_closes(limit: str) -> None:
    with bounded(**{limit: 3}) as served:
        open_ = [connect(served) for _ in range(3)]
        for sock in open_:
            sock.sendall(START + b"\r\n")
            assert sock.recv(1)
        with connect(served) as sock:
            assert refusal(sock) == (503, "too_many_connections")
        for sock in open_:
            sock.close()
        while True:
            with connect(served) as sock:
                sock.sendall(START + b"\r\n")
                if sock.recv(12) == b"HTTP/1.1 200":
                    break


def test_who_does_not_read_its_answer_is_cut_off() -> None:
    chat = json.dumps(CHAT).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with bounded(ScriptedBackend(default=lambda ask: "a" * (20 << 20)), write_timeout_s=0.3) as served:
        with connect(served) as sock:
            sock.sendall(head + b"Content-Length: %d\r\n\r\n%s" % (len(chat), chat))
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                while True:
                    sock.sendall(b"\r\n")


def test_a_stream_that_takes_its_time_is_not_cut_off() -> None:
    gate = Gate()
    with bounded(gate, header_timeout_s=0.1, body_timeout_s=0.1, keep_alive_s=0.05, idle_timeout_s=1) as served:
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            lines = answer.iter_lines()
            for _ in range(60):  # three seconds of comments
                next(lines)
            gate.open()
            assert "data: [DONE]" in list(lines)


def test_a_garbled_request_is_refused_in_the_protocols_shape() -> None:
    with bounded() as served, connect(served) as sock:
        sock.sendall(b"HELO mail\r\n\r\n")
        assert refusal(sock) == (400, "invalid_http")
