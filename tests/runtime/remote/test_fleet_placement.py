"""The fleet's own code on virtual time: what its placement is worth against rules that know less."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio
import trio.testing

from metier.runtime.remote.fleet import Fleet
from metier.runtime.settings.fleet import FleetServer, FleetSettings
from metier.specializers.shelf.variant import AskSpec, EngineSpec, Variant

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import fleet_placement as benchmark

LOAD_S, STEP_S, ROW_S, TOKEN_S = 0.06, 0.015, 0.004, 0.001
"""Roughly SmolLM2-135M on one core: a load, a step, each row of it, each prompt token computed in it."""
ROWS = 8


class TimedServer:
    """vLLM as far as time goes: rows share steps, a load stops all of them, prefixes are cached by adapter."""

    def __init__(self, name: str) -> None:
        self.url = f"http://{name}"
        self.loads = 0
        self._loading: list[trio.Event] = []
        self._waiting: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._cached: dict[tuple[str, str], int] = {}
        self._work = trio.Event()

    async def run(self) -> None:
        """Step for ever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._loading or self._waiting or self._rows:
                while self._loading:
                    await trio.sleep(LOAD_S)
                    self._loading.pop(0).set()
                await self._step()

    async def _step(self) -> None:
        computed = 0
        while self._waiting and len(self._rows) < ROWS:
            row = self._waiting.pop(0)
            key = (row["model"], row["run"])
            computed += max(row["tokens"] - self._cached.get(key, 0), 0)
            self._cached[key] = row["tokens"]
            self._rows.append(row)
        await trio.sleep(STEP_S + ROW_S * len(self._rows) + TOKEN_S * computed)
        for row in list(self._rows):
            row["left"] -= 1
            if not row["left"]:
                self._rows.remove(row)
                row["done"].set()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        path, body = request.url.path, json.loads(request.content) if request.content else {}
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny", "owned_by": "vllm"}]})
        done = trio.Event()
        if path == "/v1/load_lora_adapter":
            self.loads += 1
            self._loading.append(done)
        elif path == "/v1/chat/completions":
            text = body["messages"][0]["content"]
            run = text.partition(". ")[0]
            row = {"model": body["model"], "run": run, "tokens": len(text) // 4, "left": body["max_completion_tokens"]}
            self._waiting.append(row | {"done": done})
        else:
            return httpx.Response(200)
        self._work.set()
        await done.wait()
        usage = {"prompt_tokens": len(request.content) // 4, "completion_tokens": body.get("max_completion_tokens", 0)}
        message = {"content": "and so on " * 5}
        return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})


async def programs(rule: Callable[[], Any], number: int) -> tuple[int, float]:
    """Loads, and the 95th percentile of an ask's seconds, of 32 programs on two servers."""
    servers = [TimedServer("one"), TimedServer("two")]
    variants = {
        f"{role}{kind}": (
            Variant(
                id=f"{len(role) * 10 + kind:016x}",
                name=f"{role}{kind}",
                base="b",
                prompt_layout=1,
                engine=EngineSpec(base="b"),
                ask=AskSpec(adapter="lora", rank=8),
            ),
            Path("shelf"),
        )
        for role in ("planner", "solver")
        for kind in range(benchmark.KINDS)
    }
    named = tuple(FleetServer(url=server.url) for server in servers)
    settings = FleetSettings(servers=named, adapter_slots=benchmark.SLOTS, health_every_s=1e6)
    fleet = Fleet(settings, variants.__getitem__, place=rule())
    for server in servers:
        calls = fleet._members[server.url].remote._calls
        calls.client = httpx.AsyncClient(base_url=server.url, transport=httpx.MockTransport(server))
    options = argparse.Namespace(programs=32, concurrency=8, tokens=12)
    async with trio.open_nursery() as nursery:
        for server in servers:
            nursery.start_soon(server.run)
        async with fleet:
            seconds, _ = await benchmark.run_programs(fleet, f"round{number} of programs", options)
        nursery.cancel_scope.cancel()
    assert len(seconds) == 4 * 32
    return sum(server.loads for server in servers), sorted(seconds)[int(0.95 * len(seconds))]


def test_placement_loads_less_than_rules_that_know_no_adapters_and_keeps_nobody_waiting_longer() -> None:
    measured: dict[str, list[tuple[int, float]]] = {}
    for name, rule in benchmark.RULES.items():
        for number in range(3):
            clock = trio.testing.MockClock(autojump_threshold=0)
            measured.setdefault(name, []).append(trio.run(partial(programs, rule, number), clock=clock))
    loads = {name: sum(loads for loads, _ in found) for name, found in measured.items()}
    p95_s = {name: sum(seconds for _, seconds in found) / len(found) for name, found in measured.items()}
    for name in benchmark.RULES.keys() - {"predicted finish"}:
        assert loads["predicted finish"] < 0.85 * loads[name], loads
        assert p95_s["predicted finish"] < 1.1 * p95_s[name], p95_s
