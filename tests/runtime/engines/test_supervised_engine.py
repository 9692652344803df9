"""The supervised engine: real processes, real kills, nothing lost and nothing left behind."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from metier.agents.backend import OnText
from metier.agents.errors import AskRejectedError, BaseModelError, EngineDeadError, EngineError
from metier.agents.messages import Ask, Reply, Usage
from metier.agents.thinking import THINKING_OFF, ThinkingProfile
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.engines.pool import EnginePool
from metier.runtime.engines.supervised.processes import descendants
from metier.runtime.engines.supervised.supervised_engine import SupervisedEngine
from metier.runtime.engines.variant_targets import EngineStart
from metier.runtime.events import Event
from metier.runtime.settings.engine import EngineSettings
from metier.specializers.shelf.variant import Variant
from tests.runtime.conftest import TINY

pytestmark = pytest.mark.engine

KILLS = 15
"""Of the host, and of the core."""
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
MakeAsk = Callable[..., Ask]
Variants = dict[str, tuple[Variant, Path]]


class Engines:
    """Starts supervised engines and keeps hold of them, so that a test can aim at their processes."""

    def __init__(self) -> None:
        self.started: list[SupervisedEngine] = []
        self._shared_memory: set[str] = set()

    async def __call__(self, start: EngineStart) -> SupervisedEngine:
        engine = await SupervisedEngine.start(
            start.weights, start.settings, adapters=start.adapters, dtype=start.dtype, name=start.name
        )
        self.started.append(engine)
        self._note_shared_memory(engine.pids)
        return engine

    def _note_shared_memory(self, pids: Sequence[int]) -> None:
        """While the engine lives: one that was killed can no longer be asked what it held."""
        for pid in pids:
            self._shared_memory |= set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))

    def left_behind(self) -> list[int]:
        """Processes of any started engine's group that still run (a zombie waits for init, it does not run)."""
        groups = {engine.pids[0] for engine in self.started}
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) in groups and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def shared_memory_left(self) -> list[str]:
        """Files of shared memory that a started engine had mapped and that are still there."""
        return [path for path in sorted(self._shared_memory) if os.path.exists(path)]


def kill_after(pieces: int, pid: int) -> Callable[[str], None]:
    """A callback for streamed text that kills a process at the given piece."""
    left = itertools.count(pieces, -1)

    def on_text(piece: str) -> None:
        if next(left) == 1:
            os.kill(pid, signal.SIGKILL)

    return on_text


def thinking_asks(make_ask: MakeAsk) -> list[Ask]:
    """Asks that think in all ways, two of them with a grammar behind it."""
    return [
        make_ask("Add 1.", thinking=ThinkingProfile(max_tokens=11)),
        make_ask("Add 2.", thinking=ThinkingProfile(max_tokens=7, min_tokens=7), answer_schema=SCHEMA, max_tokens=30),
        make_ask("Add 3.", thinking=THINKING_OFF, answer_schema=SCHEMA, max_tokens=30),
        make_ask("Add 4.", thinking=ThinkingProfile(max_tokens=9, min_tokens=9, waits=1), temperature=1.0, seed=5),
    ]


async def ask_all(pool: EnginePool, asks: list[Ask], on_text: OnText | None = None) -> list[Reply]:
    replies: dict[int, Reply] = {}

    async def one(number: int, ask: Ask) -> None:
        replies[number] = await pool.reply(ask, on_text=on_text)

    async with anyio.create_task_group() as group:
        for number, ask in enumerate(asks):
            group.start_soon(one, number, ask)
    return [replies[number] for number in range(len(asks))]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])  # the loop of the host is asyncio either way
async def test_supervised_engine_serves_accounts_and_survives_kill_9(
    tiny_engine: InProcessEngine, tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk
) -> None:
    """One test, because each start takes tens of seconds."""
    engines, events, lost = Engines(), list[Event](), list[Usage]()
    names = [None, *tiny_variants]
    asks = [make_ask(f"Add {n}.", variant=names[n % 6], max_tokens=20) for n in range(18)]
    pool = EnginePool(
        tiny_base,
        tiny_variants.__getitem__,
        TINY,
        start_engine=engines,
        on_event=events.append,
        on_abandoned=lambda ask, usage: lost.append(usage),
    )
    async with pool:
        replies = await ask_all(pool, asks)
        for reply, ask in zip(replies[::6], asks[::6], strict=True):  # those of the base
            assert reply.text == (await tiny_engine.generate(EngineRequest(ask))).text

        pieces: list[str] = []
        streamed = await pool.reply(asks[1], on_text=pieces.append)
        assert "".join(pieces) == streamed.text == replies[1].text
        with_schema = await pool.reply(make_ask(answer_schema=SCHEMA, max_tokens=30))
        assert isinstance(json.loads(with_schema.text)["ok"], bool)
        with pytest.raises(AskRejectedError, match="fewer than 512"):
            await pool.reply(make_ask("seven " * 600))
        with pytest.raises(AskRejectedError, match="is refused"):
            await pool.reply(make_ask(answer_schema={"type": "nonsense"}))
        with anyio.CancelScope() as scope:
            await pool.reply(make_ask(max_tokens=480, temperature=1.0), on_text=lambda piece: scope.cancel())
        assert scope.cancelled_caught
        # Nobody streams this one, so that vLLM says nothing of it on the way.
        silent = anyio.CancelScope()

        async def ask_silently() -> None:
            with silent:
                await pool.reply(make_ask("Wait.", max_tokens=480, temperature=1.0))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_silently)
            # Both are in the engine for most of these 40 tokens; after the first, either may not have begun.
            meanwhile = await pool.reply(make_ask(max_tokens=40, temperature=1.0))
            silent.cancel()
        last = await pool.reply(make_ask(max_tokens=2))
        assert all(usage.answer_tokens > 0 for usage in lost[-2:])

        thinking = thinking_asks(make_ask)
        thoughts = await ask_all(pool, [*thinking, *asks[:2]])
        for thought, ask in zip(thoughts, thinking, strict=False):
            here = await tiny_engine.generate(EngineRequest(ask))
            assert (thought.thinking, thought.usage.thinking_tokens) == (here.thinking, here.usage.thinking_tokens)
            assert thought.profile == ask.thinking
            # A limit on the answer reaches the engine a step late when it runs in another process.
            assert thought.text.startswith(here.text) if ask.answer_schema is None else thought.text == here.text
        assert [t.usage.thinking_tokens for t in thoughts] == [11, 7, 0, 9, 0, 0]
        assert [t.text for t in thoughts[4:]] == [r.text for r in replies[:2]]

        totals = pool.totals()["base"]
        charged = sum(r.usage.cpu_s for r in [*replies, streamed, with_schema, meanwhile, last, *thoughts])
        charged += sum(totals["abandoned_cpu_s"].values()) + totals["overhead_cpu_s"]
        assert charged == pytest.approx(totals["cpu_s"], rel=0.02)
        assert sum(totals["abandoned_cpu_s"].values()) == pytest.approx(sum(u.cpu_s for u in lost))
        assert sum(r.usage.swaps for r in [*replies, streamed, *thoughts]) == totals["adapter_loads"]

        # The engine core dies while it streams an answer and the other asks wait for slots.
        survivors: list[Reply] = []
        pieces.clear()

        def kill_at_first(piece: str) -> None:
            if not pieces:
                os.kill(engines.started[0].pids[-1], signal.SIGKILL)
            pieces.append(piece)

        async def streaming() -> None:
            survivors.append(await pool.reply(asks[3], on_text=kill_at_first))

        async with anyio.create_task_group() as group:
            group.start_soon(streaming)
            again = await ask_all(pool, asks)
        assert [reply.text for reply in again] == [reply.text for reply in replies]
        assert "".join(pieces) == survivors[0].text == replies[3].text
        assert len(engines.started) == 2
        assert [event.kind for event in events].count("engine_restarted") == 1
        assert pool.totals()["base"]["restarts"] == 1
    assert engines.left_behind() == []
    assert engines.shared_memory_left() == []


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_host_that_cannot_start_says_why(tiny_base: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    shutil.copytree(tiny_base, unknown)
    (unknown / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    with pytest.raises(EngineError, match="does not start.*NoSuchModel"):
        await SupervisedEngine.start(unknown, TINY, adapters=False)
    (unknown / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="has no weights"):
        await SupervisedEngine.start(unknown, TINY, adapters=False)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_engine_whose_core_cannot_start_tells_the_cores_own_exception(tiny_base: Path, tmp_path: Path) -> None:
    """vLLM itself says "See root cause above", which is in the log of another process."""
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))  # not that of its weights
    with pytest.raises(EngineError, match=r"Its processes said: \w*Error") as told:
        await SupervisedEngine.start(broken, TINY, adapters=False)
    assert "doctor" not in str(told.value)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_core_that_is_killed_while_it_starts_may_have_had_too_little_memory(tiny_base: Path) -> None:
    """As the kernel does it when memory runs out."""
    before, over = set(descendants(os.getpid())), threading.Event()

    def kill_core() -> None:
        while not over.wait(0.01):
            for pid in set(descendants(os.getpid())) - before:
                with suppress(OSError):
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
                        return

    killing = threading.Thread(target=kill_core)
    killing.start()
    try:
        with pytest.raises(EngineError, match="the system may have run out of memory"):
            await SupervisedEngine.start(tiny_base, TINY, adapters=False)
    finally:
        over.set()
        killing.join()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_start_is_given_up_after_its_time_out(tiny_base: Path) -> None:
    settings = TINY.model_copy(update={"start_timeout_s": 0.01})
    with pytest.raises(EngineError, match=r"not ready after 0 s"):
        await SupervisedEngine.start(tiny_base, settings, adapters=False)


def made_up_host(folder: Path, does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a few lines of Python stand for the host's program: `sock` is its end of the socket."""
    program = folder / "host.py"
    program.write_text(
        f"#!{sys.executable}\nimport os, signal, socket, sys\nsock = socket.socket(fileno=int(sys.argv[3]))\n"
        f"sock.recv(1)\n{does}\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr("metier.runtime.engines.supervised.host_process.sys.executable", str(program))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_host_that_says_what_cannot_be_read_is_killed_and_its_askers_hear_of_it(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_host(tmp_path, 'sock.sendall(b\'{"op": "unknown"}\\n\')\nsignal.pause()', monkeypatch)
    with anyio.fail_after(60), pytest.raises(EngineError, match="its host process sent what cannot be read"):
        await SupervisedEngine.start(tiny_base, TINY, adapters=False)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_line_that_a_killed_host_had_not_finished_is_no_message(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_host(tmp_path, 'sock.sendall(b\'{"op": "rea\')\nos.kill(os.getpid(), signal.SIGKILL)', monkeypatch)
    with anyio.fail_after(60), pytest.raises(EngineError, match="was killed"):
        await SupervisedEngine.start(tiny_base, TINY, adapters=False)


@pytest.mark.faults
@pytest.mark.anyio
@pytest.mark.parametrize("victim", ["host", "core"])
async def test_campaign_of_kills_loses_nothing(
    tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk, victim: str
) -> None:
    """Kill at random moments under load, again and again; every ask is answered as it is without them."""
    draw, engines = random.Random(f"{victim}"), Engines()
    settings: EngineSettings = TINY.model_copy(update={"restart_limit": 2 * KILLS})
    names = [None, *tiny_variants]
    asks = [make_ask(f"Add {n}.", variant=names[n % 6], max_tokens=200) for n in range(36)]
    async with EnginePool(tiny_base, tiny_variants.__getitem__, settings, start_engine=engines) as pool:
        # A long greedy reply may end differently in another batch (rounding at a near tie); it begins the same.
        expected = [reply.text[:60] for reply in await ask_all(pool, asks)]
        for kill in range(KILLS):
            await pool.warm()
            pids = engines.started[-1].pids
            on_text = kill_after(draw.randrange(5, 400), pids[0] if victim == "host" else pids[-1])
            replies = await ask_all(pool, asks, on_text)
            assert [reply.text[:60] for reply in replies] == expected
            assert len(engines.started) == kill + 2
    assert engines.left_behind() == []
    assert engines.shared_memory_left() == []


@pytest.mark.faults
@pytest.mark.anyio
async def test_asks_of_a_dead_engine_fail_quickly_and_for_good(tiny_base: Path, make_ask: MakeAsk) -> None:
    async with await SupervisedEngine.start(tiny_base, TINY, adapters=False) as engine:
        with pytest.raises(EngineDeadError, match="SIGKILL.*the system may have run out of memory"):
            await engine.generate(
                EngineRequest(make_ask(max_tokens=480, temperature=1.0)),
                lambda piece: os.kill(engine.pids[-1], signal.SIGKILL),
            )
        with anyio.fail_after(30), pytest.raises(EngineDeadError):
            while True:
                await engine.generate(EngineRequest(make_ask()))
