"""vLLM's own server as a backend, and two as a fleet: adapters loaded while they run, schemas, streams, counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from metier.agents import Ask
from metier.agents.errors import AskRejectedError, EngineError
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.remote.fleet import Fleet
from metier.runtime.remote.remote_backend import RemoteBackend
from metier.runtime.settings.fleet import FleetServer, FleetSettings
from metier.runtime.slots.adapter import LoadedAdapter
from metier.specializers.shelf.variant import Variant
from tests.runtime.conftest import TINY
from tests.runtime.remote.stock_servers import StockServer, stock_servers

pytestmark = [pytest.mark.engine, pytest.mark.stock]


@pytest.fixture(scope="module")
def stock(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StockServer]]:
    with stock_servers(tiny_base, tmp_path_factory.mktemp("stock"), 2, dtype=TINY.dtype) as servers:
        yield servers


def test_a_stock_server_answers_as_our_own_engine_does(
    stock: list[StockServer],
    tiny_engine: InProcessEngine,
    tiny_variants: dict[str, tuple[Variant, Path]],
    make_ask: Callable[..., Ask],
) -> None:
    schema = {"enum": ["yes", "no"]}

    async def main() -> None:
        async with RemoteBackend(stock[0].url, tiny_variants.__getitem__) as remote:
            for number, name in enumerate((None, "lora0", "lora1")):
                ask = make_ask(variant=name)
                pieces: list[str] = []
                there = await remote.reply(ask, on_text=pieces.append)
                adapter = None
                if name is not None:
                    variant, folder = tiny_variants[name]
                    adapter = LoadedAdapter(900 + number, variant.id, folder / "adapter")
                    await tiny_engine.add_adapter(adapter)
                here = await tiny_engine.generate(EngineRequest(ask, adapter))
                if adapter is not None:
                    await tiny_engine.remove_adapter(adapter)
                assert there.text == here.text == "".join(pieces)
                assert there.usage.prompt_tokens == here.usage.prompt_tokens
                assert there.usage.output_tokens == here.usage.output_tokens
            answer = await remote.reply(make_ask(answer_schema=schema, variant="lora0", max_tokens=100))
            assert answer.text in ('"yes"', '"no"')
            with pytest.raises(AskRejectedError, match="maximum context length|max_model_len|tokens"):
                await remote.reply(make_ask("word " * 3000))
            missing = Path("/nowhere")
            lost = RemoteBackend(stock[0].url, lambda name: (tiny_variants["lora2"][0], missing))
            async with lost:
                with pytest.raises(EngineError, match="does not load the adapter of variant 'lora2'"):
                    await lost.reply(make_ask(variant="lora2"))

    anyio.run(main)


def test_two_stock_servers_answer_as_one_and_the_last_one_alone(
    stock: list[StockServer],
    tiny_engine: InProcessEngine,
    tiny_variants: dict[str, tuple[Variant, Path]],
    make_ask: Callable[..., Ask],
) -> None:
    """Five adapters in two slots each; then one server is killed (-9) with asks on it."""
    servers = tuple(FleetServer(url=server.url) for server in stock)
    settings = FleetSettings(servers=servers, adapter_slots=2, failures_to_open=1)
    names = [None, *tiny_variants]
    texts: list[tuple[str | None, str]] = []

    async def reference(name: str | None) -> str:
        adapter = None
        if name is not None:
            variant, folder = tiny_variants[name]
            adapter = LoadedAdapter(950, variant.id, folder / "adapter")
            await tiny_engine.add_adapter(adapter)
        reply = await tiny_engine.generate(EngineRequest(make_ask(variant=name), adapter))
        if adapter is not None:
            await tiny_engine.remove_adapter(adapter)
        return reply.text

    async def main() -> None:
        expected = {name: await reference(name) for name in names}
        async with Fleet(settings, tiny_variants.__getitem__) as fleet:
            await fleet.warm(names)
            answered = anyio.Event()

            async def ask(number: int) -> None:
                name = names[number % len(names)]
                reply = await fleet.reply(make_ask(variant=name).model_copy(update={"run_id": f"run{number}"}))
                texts.append((name, reply.text))
                if len(texts) >= 20:
                    answered.set()

            async with anyio.create_task_group() as tasks:
                for number in range(36):
                    tasks.start_soon(ask, number)
                await answered.wait()
                stock[1].kill()
            await ask(36)
            totals = fleet.totals()
        assert len(texts) == 37 and all(text == expected[name] for name, text in texts)
        assert sum(row["asks"] for row in totals.values()) == 37 and all(row["asks"] for row in totals.values())
        assert all(row["adapter_evictions"] <= row["adapter_loads"] for row in totals.values())

    anyio.run(main)
