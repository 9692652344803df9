"""The small parts between asks and engines: settings, environment, mailbox, streamed text, finish reasons."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from pydantic import ValidationError

from metier.agents.backend import ResumedText
from metier.agents.errors import EngineDeadError, EngineError, MetierError, PluginError
from metier.agents.messages import Ask, Reply
from metier.runtime.engines.engine import EngineCounters
from metier.runtime.engines.inprocess.scheduled_rows import ScheduledRows
from metier.runtime.engines.loop_mailbox import LoopMailbox, Promise
from metier.runtime.engines.supervised.host_protocol import (
    Answered,
    Begin,
    Failed,
    Load,
    Swapped,
    from_host,
    to_host,
    to_line,
)
from metier.runtime.engines.vllm_calls import finish_reason
from metier.runtime.engines.vllm_environment import engine_environment
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.settings.session import load_settings
from metier.runtime.slots.adapter import LoadedAdapter, SwapCost

MakeAsk = Callable[..., Ask]


@pytest.mark.parametrize(
    ("field", "value"), [("kv_cache_mb", 512), ("adapter_slots", 0), ("slot_rank", 12), ("restart_limit", -1)]
)
def test_settings_refuse_what_they_do_not_know(field: str, value: int) -> None:
    with pytest.raises(ValidationError, match=field):
        EngineSettings.model_validate({field: value})


@pytest.mark.parametrize(("ranks", "given"), [([], 16), ([8, 24], 32), ([8], 16), ([600], 512)])
def test_slots_are_as_wide_as_the_widest_known_adapter(ranks: list[int], given: int) -> None:
    assert EngineSettings(threads=1).with_room_for(ranks).slot_rank == given


def test_a_slot_rank_that_somebody_set_stays() -> None:
    assert load_settings(None, {"engine.slot_rank": 8}).engine.with_room_for([24]).slot_rank == 8
    assert load_settings(None, {"engine.threads": 1}).engine.with_room_for([24]).slot_rank == 32


def test_environment_keeps_a_users_tuning_but_not_what_must_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    chosen = engine_environment(threads=2, in_process=True)
    assert chosen["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert chosen["VLLM_NO_USAGE_STATS"] == "1"
    assert chosen["OMP_NUM_THREADS"] == "2"
    assert chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_runtime_engine_modules_are_light_until_an_engine_starts() -> None:
    program = (
        "import sys, metier.runtime.engines.pool, metier.runtime.engines.inprocess.inprocess_engine;"
        "import metier.runtime.engines.supervised.supervised_engine;"
        "print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.anyio
async def test_mailbox_wakes_the_loop_once_for_many_calls() -> None:
    mailbox, wakes, done = LoopMailbox(), [], anyio.Event()
    wake = mailbox._wake

    def counting(call: Callable[[], None]) -> None:
        wakes.append(call)
        wake(call)

    mailbox._wake = counting
    promises: list[Promise[int]] = [Promise() for _ in range(50)]

    def post() -> None:
        for number, promise in enumerate(promises):
            mailbox.post(lambda promise=promise, number=number: promise.succeed(number))  # type: ignore[misc]
        mailbox.post(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
        mailbox.post(done.set)
        mailbox.flush()

    thread = threading.Thread(target=post)
    thread.start()
    await done.wait()
    thread.join()
    assert len(wakes) == 1
    assert [await promise.wait() for promise in promises] == list(range(50))


def test_mailbox_of_a_loop_that_has_ended_is_silent() -> None:
    for backend in ("asyncio", "trio"):

        async def make() -> LoopMailbox:
            return LoopMailbox()

        mailbox = anyio.run(make, backend=backend)
        mailbox.post(lambda: pytest.fail("delivered"))
        mailbox.flush()


@pytest.mark.anyio
async def test_first_outcome_of_a_promise_stays() -> None:
    promise: Promise[int] = Promise()
    promise.fail(EngineError("gone"))
    promise.succeed(3)
    with pytest.raises(EngineError, match="gone"):
        await promise.wait()


def test_text_written_again_is_streamed_once() -> None:
    heard: list[str] = []
    streamed = ResumedText(heard.append)
    for piece in ("one ", "two"):
        streamed(piece)
    streamed.restart()
    for piece in ("one t", "wo thr", "ee"):
        streamed(piece)
    assert heard == ["one ", "two", " thr", "ee"]


@pytest.mark.parametrize("reason", ["error", "abort", None])
def test_only_a_natural_end_is_a_reply(reason: str | None, make_ask: MakeAsk) -> None:
    with pytest.raises(EngineError, match=f"ended the ask of role 'solver' at step 'solve' with {reason!r}"):
        finish_reason(make_ask(), reason)
    assert finish_reason(make_ask(), "length") == "length"


def test_scheduler_of_another_shape_is_refused() -> None:
    for scheduler in (SimpleNamespace(), SimpleNamespace(schedule=lambda batch: None)):
        with pytest.raises(PluginError, match="is not the method the meter listens to"):
            ScheduledRows().watch(scheduler)


def test_lines_between_engine_and_host_come_through_whole(make_ask: MakeAsk, tmp_path: Any) -> None:
    adapter = LoadedAdapter(3, "abc", tmp_path)
    load = Load(key=4, adapter=adapter)
    begin = Begin(name="n", weights=tmp_path, dtype="auto", adapters=True, settings=EngineSettings())
    counters = EngineCounters("n", cpu_s=1.5, abandoned_cpu_s={"solver": 0.5})
    answered = Answered(key=1, reply=Reply(text="two\nlines \u2028"), counters=counters)
    swapped = Swapped(key=4, cost=SwapCost(1.0, 0.5), counters=counters)
    for message in (load, begin):
        assert to_host(to_line(message)) == message
    for reply in (answered, swapped):
        line = to_line(reply)
        assert line.count(b"\n") == 1
        assert from_host(line) == reply


@pytest.mark.parametrize("error", [EngineDeadError("gone", remedy="wait"), PluginError("old", expected="new")])
def test_errors_cross_the_process_border_as_what_they_are(error: MetierError) -> None:
    received = from_host(to_line(Failed.from_error(1, error)))
    assert isinstance(received, Failed)
    again = received.to_error()
    assert (type(again), str(again)) == (type(error), str(error))


def test_clock_of_processes_reads_other_processes() -> None:
    from metier.runtime.meters.cpu_clock import ProcessesClock

    program = "import sys, time\nwhile time.process_time() < 0.1: pass\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        clock = ProcessesClock((child.pid,))
        assert clock.lap() >= 0.1
        child.stdin.close()
        child.wait()
        assert clock.lap() >= 0.0
    assert ProcessesClock((os.getpid(),)).lap() > 0
