"""A fleet over servers that behave as vLLM's do, and that die, hang, refuse, drain and come back when told to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from metier.agents import Ask, Message
from metier.agents.errors import AskRejectedError, EngineDeadError, EngineError, SettingsError, UnknownVariantError
from metier.router.placement.placement import PlacedAsk, Placement, ReplicaState
from metier.runtime.events import Event
from metier.runtime.remote.fleet import Fleet
from metier.runtime.settings.fleet import FleetServer, FleetSettings, RemoteSettings
from metier.runtime.settings.session import load_settings
from metier.specializers.shelf.variant import AskSpec, EngineSpec, Variant

pytestmark = pytest.mark.anyio

AT_ONCE = RemoteSettings(retries=1, retry_wait_s=0.0)
NEVER_S = 1e6


class Vllm:
    """A server as far as a fleet sees one: it holds adapters, answers with its name, and can be broken."""

    def __init__(self, name: str, model: str = "tiny") -> None:
        self.url = f"http://{name}"
        self.model = model
        self.adapters: set[str] = set()
        self.heard: list[tuple[str, Any]] = []
        self.most = 0
        self.using = Counter[str]()
        self.alive = True
        self.well = True
        self.broken: dict[str, int] = {}
        self.hold: anyio.Event | None = None
        self.arrived = anyio.Semaphore(0)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        path, body = request.url.path, json.loads(request.content) if request.content else {}
        self.heard.append((path, body))
        if not self.alive:
            raise httpx.ConnectError("connection refused")
        if path in self.broken:
            return httpx.Response(self.broken[path], text="broken")
        match path:
            case "/health":
                return httpx.Response(200 if self.well else 503)
            case "/v1/models":
                models = [{"id": self.model, "owned_by": "vllm"}]
                models += [{"id": name, "parent": self.model} for name in sorted(self.adapters)]
                return httpx.Response(200, json={"data": models})
            case "/v1/load_lora_adapter":
                self.adapters.add(body["lora_name"])
                self.most = max(self.most, len(self.adapters))
                return httpx.Response(200, text="loaded")
            case "/v1/unload_lora_adapter":
                assert not self.using[body["lora_name"]], "an adapter in use is taken out"
                self.adapters.discard(body["lora_name"])
                return httpx.Response(200, text="unloaded")
        return await self._complete(body)

    async def _complete(self, body: dict[str, Any]) -> httpx.Response:
        model = body["model"]
        if model not in {self.model, *self.adapters}:
            return httpx.Response(404, json={"error": {"message": f"no model {model}"}})
        if body["max_completion_tokens"] == 1:
            return httpx.Response(400, json={"error": {"message": "too long"}})
        self.using[model] += 1
        try:
            if self.hold is not None:
                self.arrived.release()
                await self.hold.wait()
                if not self.alive:
                    raise httpx.ReadError("connection reset")
        finally:
            self.using[model] -= 1
        message = {"role": "assistant", "content": f"{self.url} {model}"}
        usage = {"prompt_tokens": 5, "completion_tokens": 3}
        return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

    def restart(self) -> None:
        """Come back with nothing loaded."""
        self.adapters.clear()
        self.alive = self.well = True
        self.broken.clear()
        self.hold = None

    def count(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(heard == path for heard, _ in self.heard)


def number(name: str) -> str:
    return f"{int(name.removeprefix('lora')):016x}"


def resolve(name: str) -> tuple[Variant, Path]:
    if not name.startswith("lora"):
        raise UnknownVariantError(f"no variant {name!r}")
    engine, ask = EngineSpec(base="b"), AskSpec(adapter="lora", rank=8)
    return Variant(id=number(name), name=name, base="b", prompt_layout=1, engine=engine, ask=ask), Path("shelf") / name


def make_fleet(
    *vllms: Vllm,
    remote: RemoteSettings = AT_ONCE,
    on_event: Callable[[Event], None] | None = None,
    place: Any = None,
    adapters: dict[str, set[str]] | None = None,
    **settings: Any,
) -> Fleet:
    bounds = {"health_every_s": NEVER_S, "open_s": 0.0, "adapter_slots": 2} | settings
    servers = [FleetServer(url=v.url, adapters=(adapters or {}).get(v.url)) for v in vllms]
    how = {} if place is None else {"place": place}
    fleet = Fleet(FleetSettings(servers=tuple(servers), **bounds), resolve, remote, on_event=on_event, **how)
    for vllm in vllms:
        calls = fleet._members[vllm.url].remote._calls
        calls.client = calls.probing = httpx.AsyncClient(base_url=vllm.url, transport=httpx.MockTransport(vllm))
    return fleet


def make(variant: str | None = None, run: str = "run", **fields: Any) -> Ask:
    messages = (Message(role="user", content="2 + 2"),)
    return Ask(run_id=run, step_path="solve", role="solver", messages=messages, variant=variant, **fields)


# --- adapters -------------------------------------------------------------------------------------------------


async def test_adapters_are_loaded_on_first_use_and_leave_within_each_servers_slots() -> None:
    one, two = Vllm("one"), Vllm("two")
    events: list[Event] = []
    async with make_fleet(one, two, on_event=events.append) as fleet:
        await fleet.warm([f"lora{n}" for n in range(6)])
        assert not one.adapters and not two.adapters
        async with anyio.create_task_group() as tasks:
            for turn in range(60):
                tasks.start_soon(fleet.reply, make(f"lora{turn % 6}", f"run{turn}"))
        totals = fleet.totals()
    assert max(one.most, two.most) <= 2
    assert sum(row["asks"] for row in totals.values()) == 60
    loads = one.count("/v1/load_lora_adapter") + two.count("/v1/load_lora_adapter")
    assert loads == sum(row["adapter_loads"] for row in totals.values())
    assert loads == sum(event.kind == "adapter_loaded" for event in events) and loads < 60
    assert {event.data["adapter"] for event in events} == {f"lora{n}" for n in range(6)}


async def test_an_ask_goes_where_its_adapter_is_and_says_so() -> None:
    one, two = Vllm("one"), Vllm("two")
    async with make_fleet(one, two) as fleet:
        await fleet.warm()
        two_first: list[ReplicaState] = [fleet._members[two.url].account.state]
        with fleet._members[one.url].account.answering(PlacedAsk(None, "busy", 1000, 1000)):
            reply = await fleet.reply(make("lora1"))
        assert two_first[0].adapters == {number("lora1"): 0}
        again = await fleet.reply(make("lora1", "another"))
    assert reply.text == again.text == f"{two.url} {number('lora1')}"
    assert reply.placement.startswith(f"{two.url}: adapter loads") and reply.usage.swaps == 1
    assert again.placement.startswith(f"{two.url}: adapter resident") and again.usage.swaps == 0


async def test_a_hot_adapter_spreads_and_a_cold_one_is_nowhere() -> None:
    one, two = Vllm("one"), Vllm("two")
    async with make_fleet(one, two) as fleet:
        await fleet.warm(["lora1", "lora2"])
        one.hold = two.hold = hold = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for run in range(8):
                tasks.start_soon(fleet.reply, make("lora1", f"run{run}"))
            for _ in range(8):
                with anyio.fail_after(10):
                    await anyio.wait_all_tasks_blocked()
            assert one.using[number("lora1")] and two.using[number("lora1")]
            hold.set()
    assert number("lora2") not in one.adapters | two.adapters


async def test_a_server_holds_only_what_it_may() -> None:
    one, two = Vllm("one"), Vllm("two")
    async with make_fleet(one, two, adapters={one.url: {"lora1"}, two.url: {number("lora2")}}) as fleet:
        await fleet.warm(["lora1", "lora2", None])
        assert (await fleet.reply(make("lora1"))).text.startswith(one.url)
        assert (await fleet.reply(make("lora2"))).text.startswith(two.url)
        with pytest.raises(UnknownVariantError, match="'lora3': fleet.servers lets none hold it.*`adapters`"):
            await fleet.reply(make("lora3"))
        with pytest.raises(UnknownVariantError, match="'lora3'"):
            await fleet.warm(["lora3"])


async def test_a_load_that_one_server_refuses_is_tried_at_the_other() -> None:
    one, two = Vllm("one"), Vllm("two")
    one.broken["/v1/load_lora_adapter"] = 500
    async with make_fleet(one, two) as fleet:
        await fleet.warm(["lora1"])
        reply = await fleet.reply(make("lora1"))
        assert reply.text.startswith(two.url) and reply.placement.startswith(f"{one.url} failed; {two.url}: ")
        two.broken["/v1/load_lora_adapter"] = 404
        with pytest.raises(EngineError, match="'lora2': http://one: .*does not load.*http://two: .*does not load"):
            await fleet.reply(make("lora2"))
        assert fleet._members[one.url].account.state.healthy


async def test_an_adapter_that_somebody_took_out_is_loaded_again() -> None:
    one = Vllm("one")
    async with make_fleet(one) as fleet:
        await fleet.warm(["lora1"])
        await fleet.reply(make("lora1"))
        one.adapters.clear()
        assert (await fleet.reply(make("lora1"))).text.endswith(number("lora1"))
    assert one.count("/v1/load_lora_adapter") == 2


# --- failures -------------------------------------------------------------------------------------------------


async def test_what_was_under_way_when_a_server_died_is_answered_elsewhere() -> None:
    one, two = Vllm("one"), Vllm("two")
    replies: list[str] = []
    async with make_fleet(one, two) as fleet:
        await fleet.warm()
        one.hold = two.hold = hold = anyio.Event()

        async def ask(run: int) -> None:
            pieces: list[str] = []
            replies.append((await fleet.reply(make(run=f"run{run}"))).text + "".join(pieces))

        async with anyio.create_task_group() as tasks:
            for run in range(10):
                tasks.start_soon(ask, run)
            for _ in range(10):
                await anyio.wait_all_tasks_blocked()
            assert one.using[one.model] and two.using[two.model]
            one.alive = False
            hold.set()
        assert replies == [f"{two.url} tiny"] * 10
        assert not fleet._members[one.url].account.state.healthy
        asked = one.count("/v1/chat/completions")
        await fleet.reply(make())
        assert one.count("/v1/chat/completions") == asked
        assert fleet.totals()[one.url]["failed_asks"] >= 3


async def test_a_server_that_comes_back_is_looked_at_anew() -> None:
    one, events = Vllm("one"), list[Event]()
    async with make_fleet(one, Vllm("two"), on_event=events.append, failures_to_open=1) as fleet:
        await fleet.warm(["lora1"])
        await fleet.reply(make("lora1"))
        assert one.adapters
        one.alive = False
        assert (await fleet.reply(make("lora1"))).text.startswith("http://two")
        member = fleet._members[one.url]
        await member.look_after()
        assert not member.account.state.healthy
        one.restart()
        await member.look_after()
        assert member.account.state.healthy and not member.account.state.adapters
        await fleet.drain("http://two/v1")
        assert (await fleet.reply(make("lora1"))).text.startswith(one.url)
    kinds = [event.kind for event in events if event.kind.startswith("server")]
    assert kinds == ["server_lost", "server_back"]


async def test_one_that_comes_back_as_another_model_stays_out() -> None:
    one = Vllm("one")
    async with make_fleet(one, Vllm("two"), failures_to_open=1) as fleet:
        await fleet.warm()
        one.alive = False
        await fleet.reply(make())
        one.restart()
        one.model = "another"
        await fleet._members[one.url].look_after()
        assert not fleet._members[one.url].account.state.healthy
        assert "serves 'another', and http://one serves 'tiny'" in fleet._members[one.url].trouble


async def test_asks_at_a_server_that_hangs_go_elsewhere_once_its_health_says_so() -> None:
    one, two = Vllm("one"), Vllm("two")
    async with make_fleet(one, two, failures_to_open=2) as fleet:
        await fleet.warm()
        one.hold = anyio.Event()
        replies: list[str] = []

        async def ask() -> None:
            replies.append((await fleet.reply(make())).text)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await one.arrived.acquire()
            one.well = False
            await fleet._members[one.url].look_after()
            assert fleet._members[one.url].account.state.healthy and not replies
            await fleet._members[one.url].look_after()
    assert replies == [f"{two.url} tiny"]


async def test_a_server_that_asks_gave_up_is_given_up_by_those_that_still_wait() -> None:
    one, two = Vllm("one"), Vllm("two")
    async with make_fleet(one, two, failures_to_open=1) as fleet:
        await fleet.warm()
        one.hold = anyio.Event()
        replies: list[str] = []

        async def ask() -> None:
            replies.append((await fleet.reply(make())).text)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await one.arrived.acquire()
            fleet._members[one.url].failed(EngineDeadError("another ask timed out"))
            await anyio.wait_all_tasks_blocked()
            assert not replies
            one.well = False
            await fleet._members[one.url].look_after()
    assert replies == [f"{two.url} tiny"]


async def test_what_is_refused_as_wrong_is_asked_nowhere_else() -> None:
    one, two = Vllm("one"), Vllm("two")
    async with make_fleet(one, two) as fleet:
        await fleet.warm()
        with pytest.raises(AskRejectedError, match="400: too long"):
            await fleet.reply(make(max_tokens=1))
    assert one.count("/v1/chat/completions") + two.count("/v1/chat/completions") == 1


async def test_servers_without_room_are_waited_for_and_not_given_up() -> None:
    one, two = Vllm("one"), Vllm("two")
    one.broken = {"/v1/chat/completions": 429}
    async with make_fleet(one, two, remote=RemoteSettings(retries=3, retry_wait_s=0.0), failures_to_open=1) as fleet:
        await fleet.warm()
        for run in range(4):
            assert (await fleet.reply(make(run=f"run{run}"))).text.startswith(two.url)
        two.broken = {"/v1/chat/completions": 429}
        with pytest.raises(EngineDeadError, match="no server takes asks: .*one: .*429.*two: .*429"):
            await fleet.reply(make())
        assert two.count("/v1/chat/completions") == 4 + 4
        one.broken = {}
        assert (await fleet.reply(make())).text.startswith(one.url)


async def test_an_ask_that_fails_everywhere_ends_after_so_many_tries() -> None:
    one, two = Vllm("one"), Vllm("two")
    one.broken = two.broken = {"/v1/chat/completions": 500}
    async with make_fleet(one, two, tries=3, failures_to_open=100) as fleet:
        await fleet.warm()
        with pytest.raises(EngineDeadError, match="failed 3 times.*500: broken.*fleet.tries=3"):
            await fleet.reply(make())
    assert one.count("/v1/chat/completions") + two.count("/v1/chat/completions") == 3


async def test_a_fleet_that_nobody_warmed_looks_before_its_first_ask() -> None:
    one, two = Vllm("one"), Vllm("two")
    async with make_fleet(one, two) as fleet, anyio.create_task_group() as tasks:
        for run in range(4):
            tasks.start_soon(fleet.reply, make(run=f"run{run}"))
    assert one.count("/v1/models") == two.count("/v1/models") == 1
    assert one.count("/v1/chat/completions") + two.count("/v1/chat/completions") == 4


async def test_no_server_that_answers_is_said_for_each() -> None:
    one, two = Vllm("one"), Vllm("two")
    one.alive = two.alive = False
    async with make_fleet(one, two) as fleet:
        with pytest.raises(EngineDeadError, match="http://one cannot be reached.*http://two cannot be reached"):
            await fleet.warm()
        with pytest.raises(EngineDeadError, match="no server takes asks"):
            await fleet.reply(make())
        two.restart()
        await fleet._members[two.url].look_after()
        assert (await fleet.reply(make())).text == f"{two.url} tiny"


# --- drain, and what is wrong from the start ----------------------------------------------------------------------


async def test_a_server_that_drains_ends_what_it_has_and_gets_no_more() -> None:
    one, two = Vllm("one"), Vllm("two")
    order: list[str] = []
    async with make_fleet(one, two) as fleet:
        await fleet.warm()
        one.hold = anyio.Event()

        async def ask() -> None:
            order.append((await fleet.reply(make())).text)

        async def drain() -> None:
            await fleet.drain(one.url)
            order.append("drained")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await one.arrived.acquire()
            tasks.start_soon(drain)
            await anyio.wait_all_tasks_blocked()
            order.append((await fleet.reply(make())).text)
            one.hold.set()
        fleet.admit(one.url)
        one.hold = None
        order.append((await fleet.reply(make(run="new"))).text)
    assert order == [f"{two.url} tiny", f"{one.url} tiny", "drained", f"{one.url} tiny"]


async def test_a_server_of_another_model_is_said() -> None:
    async with make_fleet(Vllm("one"), Vllm("two", "another")) as fleet:
        with pytest.raises(EngineError, match="http://two serves 'another', and http://one serves 'tiny'"):
            await fleet.warm()
    async with make_fleet(Vllm("one"), model="other") as fleet:
        with pytest.raises(EngineError, match="http://one serves 'tiny', and fleet.model='other' is set"):
            await fleet.warm()


async def test_a_variant_that_nobody_knows_is_said_before_anything_runs() -> None:
    async with make_fleet(Vllm("one"), Vllm("two")) as fleet:
        with pytest.raises(UnknownVariantError, match="http://one: no variant 'nobody'; http://two: no variant"):
            await fleet.warm(["nobody"])


def test_servers_named_twice_and_addresses_that_are_none_are_said() -> None:
    with pytest.raises(SettingsError, match="server http://a:1 is named twice"):
        FleetSettings().of(["http://a:1", "http://A:1/v1/"])
    with pytest.raises(SettingsError, match="servers http://a:1, b:2: String should match.*http://HOST:PORT"):
        FleetSettings().of(["http://a:1", "b:2"])
    with pytest.raises(SettingsError, match="is named twice"):
        load_settings(overrides={"fleet.servers": [{"url": "http://a:1"}, {"url": "http://a:1/v1"}]})
    with pytest.raises(SettingsError, match="'fleet.servers.0.urls'.*Did you mean 'fleet.servers.0.url'"):
        load_settings(overrides={"fleet.servers": [{"url": "http://a:1", "urls": 2}]})
    with pytest.raises(SettingsError, match="without servers"):
        Fleet(FleetSettings())
    named = FleetSettings(servers=(FleetServer(url="http://a:1", adapter_slots=9),))
    assert [s.adapter_slots for s in named.of(["http://b:1/v1", "http://a:1"]).servers] == [None, 9]


async def test_placement_may_be_anothers() -> None:
    def last(ask: PlacedAsk, replicas: list[ReplicaState], costs: Any) -> Placement:
        return Placement(replicas[-1].name, "the last", 0.0)

    one, two = Vllm("one"), Vllm("two")
    async with make_fleet(one, two, place=last) as fleet:
        await fleet.warm()
        reply = await fleet.reply(make())
    assert reply.text.startswith(two.url) and reply.placement == "the last"
