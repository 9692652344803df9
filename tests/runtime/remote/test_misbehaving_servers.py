"""Servers on loopback that hang, drip, answer garbage or keep a connection half open, beside one that is well."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from metier.agents import Ask, Message
from metier.agents.errors import EngineDeadError
from metier.runtime.remote.fleet import Fleet
from metier.runtime.remote.remote_backend import RemoteBackend
from metier.runtime.settings.fleet import FleetServer, FleetSettings, RemoteSettings

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/chat/completions"
DRIP_EVERY_S = 0.1


def http(body: bytes, *headers: str, kind: str = "application/json") -> bytes:
    """A response of HTTP/1.1 that says it is well."""
    head = ["HTTP/1.1 200 OK", f"content-type: {kind}", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def said(name: str) -> bytes:
    choice = {"message": {"role": "assistant", "content": name}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}).encode()


MODELS = json.dumps({"data": [{"id": "tiny", "owned_by": "vllm"}]}).encode()
GARBAGE = {
    "html": http(b"<html>maintenance</html>", kind="text/html"),
    "null": http(b'{"choices": null}'),
    "cut JSON": http(b'{"choices": [{"mess'),
    "bad gzip": http(b"\x1f\x8bnothing", "content-encoding: gzip"),
    "no HTTP": b"\x00\xff" * 40 + b"\r\n\r\n",
}


class Server:
    """Answers as vLLM does, but for the paths in `ways`: "silent", "drip", or bytes that it sends instead."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        self.ways: dict[str, str | bytes] = {}
        self.asked: dict[str, int] = {}
        self.arrived = anyio.Event()

    def break_down(self, way: str | bytes) -> None:
        """Behave so wherever one asks."""
        self.ways = dict.fromkeys(("/health", "/v1/models", COMPLETIONS), way)

    async def handle(self, stream: SocketStream) -> None:
        async with stream:
            try:
                while path := await _read_request(stream):
                    await self._answer(stream, path)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream):
                return

    async def _answer(self, stream: SocketStream, path: str) -> None:
        self.asked[path] = self.asked.get(path, 0) + 1
        way = self.ways.get(path)
        if path == COMPLETIONS and way is not None:
            self.arrived.set()
        whole = {"/health": http(b""), "/v1/models": http(MODELS), COMPLETIONS: http(said(self.name))}[path]
        match way:
            case "silent":
                await anyio.sleep_forever()
            case "drip":
                for number in range(len(whole)):
                    await stream.send(whole[number : number + 1])
                    await anyio.sleep(DRIP_EVERY_S)
            case bytes():
                await stream.send(way)
                await stream.aclose()
            case _:
                await stream.send(whole)


async def _read_request(stream: SocketStream) -> str:
    """The path of the next request, which has been read whole."""
    read = b""
    while b"\r\n\r\n" not in read:
        read += await stream.receive()
    head, _, body = read.partition(b"\r\n\r\n")
    lengths = [line for line in head.decode().lower().splitlines() if line.startswith("content-length:")]
    missing = int(lengths[0].split(":")[1]) - len(body) if lengths else 0
    while missing > 0:
        missing -= len(await stream.receive())
    return head.split()[1].decode()


@asynccontextmanager
async def serving(*servers: Server) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        for server in servers:
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
            server.url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
            tasks.start_soon(listener.serve, server.handle)
        yield
        tasks.cancel_scope.cancel()


def fleet_of(*servers: Server, remote: dict[str, Any] | None = None, **settings: Any) -> Fleet:
    bounds = {"health_every_s": 0.05, "health_timeout_s": 1.0, "failures_to_open": 2, "open_s": 0.1} | settings
    return Fleet(
        FleetSettings(servers=tuple(FleetServer(url=server.url) for server in servers), **bounds),
        remote=RemoteSettings(**{"retries": 20, "retry_wait_s": 0.1, "retry_wait_max_s": 1.0} | (remote or {})),
    )


def make(run: str) -> Ask:
    return Ask(run_id=run, step_path="solve", role="solver", messages=(Message(role="user", content="2 + 2"),))


async def ask_many(fleet: Fleet, number: int, stop: Server, way: str | bytes, *, everywhere: bool) -> list[str]:
    """Ask at once, with a server that misbehaves before any ask has reached it; the texts of all replies."""
    texts: list[str] = []

    async def one(name: str) -> None:
        texts.append((await fleet.reply(make(name))).text)

    if everywhere:
        stop.break_down(way)
    else:
        stop.ways = {COMPLETIONS: way}
    async with anyio.create_task_group() as tasks:
        for name in range(number):
            tasks.start_soon(one, f"run{name}")
    return texts


@pytest.mark.parametrize("way", ["silent", "drip", *GARBAGE.values()], ids=["silent", "drip", *GARBAGE])
async def test_what_is_under_way_at_a_server_that_misbehaves_is_answered_by_the_other(way: str | bytes) -> None:
    one, two = Server("one"), Server("two")
    async with serving(one, two), fleet_of(one, two) as fleet:
        await fleet.warm()
        with anyio.fail_after(120):
            texts = await ask_many(fleet, 12, one, way, everywhere=True)
    assert texts == ["two"] * 12
    assert one.asked[COMPLETIONS] > 0


async def test_a_socket_that_nobody_accepts_any_more_is_a_server_that_hangs() -> None:
    """Half open: the kernel takes the connection and what is sent, and nobody is there."""
    one, two = Server("one"), Server("two")
    async with serving(one, two):
        async with await anyio.create_tcp_listener(local_host="127.0.0.1", backlog=64) as deaf:
            async with fleet_of(one, two) as fleet:
                await fleet.warm()
                member = fleet._members[one.url]
                for client in (member.remote._calls.client, member.remote._calls.probing):
                    client.base_url = f"http://127.0.0.1:{deaf.extra(SocketAttribute.local_port)}"
                with anyio.fail_after(120):
                    assert await ask_many(fleet, 6, one, "silent", everywhere=False) == ["two"] * 6


@pytest.mark.parametrize("way", ["silent", "drip"])
async def test_a_server_whose_health_is_good_and_that_answers_no_ask_gets_none_after_a_few(way: str) -> None:
    """As vLLM's own server does when its engine's process hangs: `/health` goes on saying 200."""
    one, two = Server("one"), Server("two")
    bounds: dict[str, Any] = {"health_every_s": 1e6, "open_s": 0.0, "load_timeout_s": 1.0}
    bounds["remote"] = {"answer_timeout_s": 4.0}
    async with serving(one, two), fleet_of(one, two, **bounds) as fleet:
        await fleet.warm()
        with anyio.fail_after(120):
            assert await ask_many(fleet, 12, one, way, everywhere=False) == ["two"] * 12
            member = fleet._members[one.url]
            assert not member.account.state.healthy
            tried = one.asked[COMPLETIONS]
            while one.asked[COMPLETIONS] == tried:  # a busy machine may miss the bound of a health check
                await member.look_after()
            assert not member.account.state.healthy  # the trial is an ask, and fails too
            one.ways = {}
            while not member.account.state.healthy:
                await member.look_after()


async def test_garbage_opens_the_breaker() -> None:
    one, two = Server("one"), Server("two")
    async with serving(one, two), fleet_of(one, two, open_s=1e6) as fleet:
        await fleet.warm()
        with anyio.fail_after(120):
            assert await ask_many(fleet, 12, one, GARBAGE["null"], everywhere=False) == ["two"] * 12
            assert await ask_many(fleet, 12, one, GARBAGE["null"], everywhere=False) == ["two"] * 12
        assert fleet.totals()[one.url]["failed_asks"] >= 2
        assert not fleet._members[one.url].account.state.healthy


async def test_an_answer_that_drips_is_given_up_by_its_name() -> None:
    one = Server("one")
    one.ways = {COMPLETIONS: "drip"}
    async with serving(one):
        async with RemoteBackend(one.url, settings=RemoteSettings(retries=0, answer_timeout_s=0.3)) as remote:
            with anyio.fail_after(120), pytest.raises(EngineDeadError, match=r"remote\.answer_timeout_s=0\.3"):
                await remote.reply(make("run"))
