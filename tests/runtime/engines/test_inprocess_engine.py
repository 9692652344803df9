"""The in-process engine on a tiny real model, from asyncio and from trio."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from metier.agents.errors import AskRejectedError, BaseModelError, EngineError
from metier.agents.messages import Ask, Reply, Usage
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.slots.adapter import LoadedAdapter
from tests.runtime.conftest import TINY

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

SCHEMA = {"type": "object", "properties": {"value": {"type": "integer", "maximum": 99}}, "required": ["value"]}
MakeAsk = Callable[..., Ask]


async def generate_all(engine: InProcessEngine, asks: list[Ask]) -> list[Reply]:
    replies: dict[int, Reply] = {}

    async def one(number: int, ask: Ask) -> None:
        replies[number] = await engine.generate(EngineRequest(ask))

    async with anyio.create_task_group() as group:
        for number, ask in enumerate(asks):
            group.start_soon(one, number, ask)
    return [replies[number] for number in range(len(asks))]


async def test_asks_together_and_alone_get_the_same_replies(tiny_engine: InProcessEngine, make_ask: MakeAsk) -> None:
    asks = [make_ask(f"Add {n} and 7.", max_tokens=6 + n) for n in range(12)]
    together = await generate_all(tiny_engine, asks)
    for ask, reply in zip(asks, together, strict=True):
        alone = await tiny_engine.generate(EngineRequest(ask))
        assert alone.text == reply.text
        assert reply.usage.prompt_tokens > 5
        assert 0 < reply.usage.answer_tokens <= ask.max_tokens
        assert reply.finish_reason == ("length" if reply.usage.answer_tokens == ask.max_tokens else "stop")
        assert reply.usage.prefill_s > 0 and reply.usage.cpu_s > 0 and reply.engine == "tiny"


async def test_second_ask_of_a_long_prompt_reuses_its_prefix(tiny_engine: InProcessEngine, make_ask: MakeAsk) -> None:
    ask = make_ask("State the final answer as one integer. " * 8, max_tokens=2)
    await tiny_engine.generate(EngineRequest(ask))
    again = await tiny_engine.generate(EngineRequest(ask))
    assert again.usage.cached_tokens >= TINY.block_tokens
    assert again.usage.cached_tokens % TINY.block_tokens == 0


async def test_streamed_pieces_join_to_the_text(tiny_engine: InProcessEngine, make_ask: MakeAsk) -> None:
    pieces: list[str] = []
    reply = await tiny_engine.generate(EngineRequest(make_ask(max_tokens=40)), pieces.append)
    assert "".join(pieces) == reply.text
    assert len(pieces) > 1
    plain = await tiny_engine.generate(EngineRequest(make_ask(max_tokens=40)))
    assert (plain.text, plain.usage.answer_tokens) == (reply.text, reply.usage.answer_tokens)


async def test_error_of_the_callback_fails_its_own_ask(tiny_engine: InProcessEngine, make_ask: MakeAsk) -> None:
    def refuse(piece: str) -> None:
        raise ZeroDivisionError(piece)

    with pytest.raises(ZeroDivisionError):
        await tiny_engine.generate(EngineRequest(make_ask(max_tokens=400)), refuse)
    assert (await tiny_engine.generate(EngineRequest(make_ask()))).text


async def test_cancelled_ask_stops_in_the_engine_and_stays_on_its_roles_account(
    tiny_engine: InProcessEngine, make_ask: MakeAsk
) -> None:
    lost: list[tuple[str, Usage]] = []
    told, before = anyio.Event(), tiny_engine.counters()

    def on_abandoned(ask: Ask, usage: Usage) -> None:
        lost.append((ask.role, usage))
        told.set()

    ask = make_ask(role="dawdler", max_tokens=480, temperature=1.0, seed=3)
    with anyio.CancelScope() as scope:
        await tiny_engine.generate(EngineRequest(ask, on_abandoned=on_abandoned), lambda piece: scope.cancel())
    assert scope.cancelled_caught
    await told.wait()
    ((role, usage),) = lost
    assert role == "dawdler" and 0 < usage.answer_tokens < 480 and usage.cpu_s > 0
    after = tiny_engine.counters()
    assert after.abandoned_cpu_s["dawdler"] == pytest.approx(
        before.abandoned_cpu_s.get("dawdler", 0.0) + usage.cpu_s, rel=1e-9
    )
    await tiny_engine.generate(EngineRequest(make_ask(max_tokens=3)))
    assert tiny_engine.counters().decode_tokens - before.decode_tokens < 200


async def test_prompt_longer_than_the_context_is_refused(tiny_engine: InProcessEngine, make_ask: MakeAsk) -> None:
    with pytest.raises(AskRejectedError, match=r"role 'solver' at step 'solve' has \d+ tokens.*fewer than 512"):
        await tiny_engine.generate(EngineRequest(make_ask("seven " * 600)))
    assert (await tiny_engine.generate(EngineRequest(make_ask()))).text


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": "object", "properties": 3}, {"$ref": "#/nowhere"}])
async def test_impossible_schema_is_refused_for_that_ask_only(
    tiny_engine: InProcessEngine, make_ask: MakeAsk, schema: dict[str, Any]
) -> None:
    good = make_ask(max_tokens=30)
    with pytest.raises(AskRejectedError, match="is refused"):
        await tiny_engine.generate(EngineRequest(make_ask(answer_schema=schema)))
    assert (await tiny_engine.generate(EngineRequest(good))).text


async def test_one_batch_has_grammars_of_several_kinds(tiny_engine: InProcessEngine, make_ask: MakeAsk) -> None:
    """Each reply fits its own schema, whichever kind was first in this engine."""
    named = {"type": "object", "required": ["fives"], "additionalProperties": False}
    fives = {"type": "integer", "multipleOf": 5, "minimum": 5, "maximum": 995}
    schemas = {
        "xgrammar": {**named, "properties": {"fives": {"type": "integer", "minimum": 5, "maximum": 995}}},
        "guidance": {**named, "properties": {"fives": fives}},
    }
    asks = [
        make_ask(f"Add {n} and 7.", answer_schema=schemas[kind], max_tokens=40, temperature=1.0, seed=n)
        for n in range(4)
        for kind in ("guidance", "xgrammar")
    ]
    replies = await generate_all(tiny_engine, asks)
    assert [reply.grammar for reply in replies] == ["guidance", "xgrammar"] * 4
    for reply in replies:
        assert reply.finish_reason == "stop", reply.text
        found = json.loads(reply.text)
        assert 5 <= found["fives"] <= 995
        assert reply.grammar == "xgrammar" or found["fives"] % 5 == 0


async def test_schema_holds_on_base_and_adapter(
    tiny_engine: InProcessEngine, make_ask: MakeAsk, tiny_variants: dict[str, Any]
) -> None:
    adapter = LoadedAdapter(901, "schema-adapter", tiny_variants["lora1"][1] / "adapter")
    await tiny_engine.add_adapter(adapter)
    ask = make_ask(answer_schema=SCHEMA, max_tokens=40)
    texts = []
    for request in (EngineRequest(ask), EngineRequest(ask, adapter)):
        reply = await tiny_engine.generate(request)
        assert isinstance(json.loads(reply.text)["value"], int)
        texts.append(reply)
    assert texts[0].variant is None and texts[1].variant == "schema-adapter"
    await tiny_engine.remove_adapter(adapter)


async def test_an_ask_that_breaks_the_step_fails_alone(
    tiny_engine: InProcessEngine, make_ask: MakeAsk, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [make_ask(f"Add {n} and 3.", step=f"s{n}") for n in range(5)]
    expected = [reply.text for reply in await generate_all(tiny_engine, good)]
    executor = tiny_engine._llm._llm.engine_core.engine_core.model_executor
    execute = executor.execute_model

    def breaks(scheduled: Any, **kwargs: Any) -> Any:
        if any(id.startswith("poison") for id in scheduled.num_scheduled_tokens):
            raise RuntimeError("kernel says no")
        return execute(scheduled, **kwargs)

    monkeypatch.setattr(executor, "execute_model", breaks)
    failures: list[EngineError] = []
    pieces: list[str] = []
    replies: dict[int, Reply] = {}

    async def poisoned() -> None:
        with pytest.raises(EngineError, match="role 'poison' at step 'bad'.*kernel says no") as caught:
            await tiny_engine.generate(EngineRequest(make_ask("Add 1 and 1.", role="poison", step="bad")))
        failures.append(caught.value)

    async def fine(number: int) -> None:
        on_text = pieces.append if number == 0 else None
        replies[number] = await tiny_engine.generate(EngineRequest(good[number]), on_text)

    async with anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(fine, number)
        group.start_soon(poisoned)
        for number in range(3, 5):
            group.start_soon(fine, number)
    assert len(failures) == 1
    assert [replies[number].text for number in range(5)] == expected
    assert "".join(pieces) == expected[0]


async def test_two_engines_in_one_process_and_closing_one(
    tiny_engine: InProcessEngine, tiny_base: Path, make_ask: MakeAsk
) -> None:
    ask = make_ask(max_tokens=20)
    before = await tiny_engine.generate(EngineRequest(ask))
    async with await InProcessEngine.start(tiny_base, TINY, adapters=False, name="second") as second:
        both: list[Reply] = []

        async def one(engine: InProcessEngine) -> None:
            both.append(await engine.generate(EngineRequest(ask)))

        async with anyio.create_task_group() as group:
            for engine in (tiny_engine, second) * 4:
                group.start_soon(one, engine)
        assert {reply.text for reply in both} == {before.text}
        assert {reply.engine for reply in both} == {"tiny", "second"}
        unfinished: list[EngineError] = []

        async def interrupted() -> None:
            with pytest.raises(EngineError, match="engine 'second' is closed") as caught:
                await second.generate(EngineRequest(make_ask(max_tokens=480, temperature=1.0, seed=1)))
            unfinished.append(caught.value)

        async with anyio.create_task_group() as group:
            group.start_soon(interrupted)
            await second.generate(EngineRequest(make_ask(max_tokens=2)))
            await second.close()
        assert len(unfinished) == 1
    await second.close()
    with pytest.raises(EngineError, match="closed"):
        await second.generate(EngineRequest(ask))
    assert (await tiny_engine.generate(EngineRequest(ask))).text == before.text


async def test_folder_that_is_no_checkpoint(
    tiny_engine: InProcessEngine, tiny_base: Path, tmp_path: Path, make_ask: MakeAsk
) -> None:
    config = '{"architectures": ["NoSuchModel"], "model_type": "llama"}'
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BaseModelError, match="has no weights"):
        await InProcessEngine.start(tmp_path, TINY, adapters=False)
    unknown = tmp_path / "unknown"
    shutil.copytree(tiny_base, unknown)
    (unknown / "config.json").write_text(config)
    with pytest.raises(EngineError, match="does not start"):
        await InProcessEngine.start(unknown, TINY, adapters=False)
    assert (await tiny_engine.generate(EngineRequest(make_ask()))).text


async def test_an_engine_that_ends_by_itself_leaves_the_process_groups_to_the_others(
    tiny_engine: InProcessEngine, make_ask: MakeAsk
) -> None:
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory()  # as vLLM does when an engine that failed to start is collected
    assert (await tiny_engine.generate(EngineRequest(make_ask()))).text


FORGOTTEN = """
import sys, anyio
from pathlib import Path
from metier.agents.messages import Ask, Message
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine

async def main():
    global engine
    settings = EngineSettings(eager=True, kv_cache_mib=64, max_model_tokens=512, threads=1)
    engine = await InProcessEngine.start(Path(sys.argv[1]), settings, adapters=False)
    ask = Ask(run_id="r", step_path="s", role="x", messages=(Message(role="user", content="Go."),), max_tokens=480,
              temperature=1.0)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(engine.generate, EngineRequest(ask), lambda piece: scope.cancel())

anyio.run(main)
"""

INTERRUPTED = """
import sys, anyio
from functools import partial
from pathlib import Path
from metier.agents.messages import Ask, Message
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine

async def main():
    settings = EngineSettings(eager=True, kv_cache_mib=64, max_model_tokens=512, threads=1)
    start = partial(InProcessEngine.start, Path(sys.argv[1]), settings, adapters=False)
    async with await start() as engine:
        ask = Ask(run_id="r", step_path="s", role="x", messages=(Message(role="user", content="Go."),),
                  max_tokens=480, temperature=1.0)
        await engine.generate(EngineRequest(ask), lambda piece: print("text", flush=True))
        while True:
            await engine.generate(EngineRequest(ask))

anyio.run(main, backend=sys.argv[2])
"""


def test_program_that_forgets_to_close_ends_all_the_same(tiny_base: Path) -> None:
    command = [sys.executable, "-c", FORGOTTEN, str(tiny_base)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_interrupt_from_the_keyboard_ends_the_program_cleanly(tiny_base: Path, backend: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tiny_base), backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if line.startswith("text"):
                break
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=120)
    assert program.returncode != 0
    assert "KeyboardInterrupt" in errors
    for trouble in ("ValueError", "RuntimeError", "Segmentation", "ResourceWarning", "never closed"):
        assert trouble not in errors
