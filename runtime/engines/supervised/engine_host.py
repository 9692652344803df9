"""The process that holds a supervised engine: vLLM's AsyncLLM, asked over a socket.

Run as `python -m metier.runtime.engines.supervised.engine_host FD`. It ends on a `Quit` message, when the engine dies,
and when the other end of the socket goes away, so that no engine outlives the program it serves.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import sys
import time
from collections import Counter
from contextlib import aclosing
from typing import Any

from ....agents.errors import AdapterError, EngineDeadError, MetierError
from ....agents.messages import Reply, Usage
from ...meters.cpu_clock import ProcessesClock
from ...meters.cpu_meter import CpuMeter, StepRow
from ...plugin.orphan_guard import guard_children
from ..ended_processes import how_ended
from ..engine import EngineCounters, EngineRequest
from ..engine_arguments import engine_arguments
from ..engine_errors import adapter_refused, ask_error, not_started
from ..vllm_calls import VllmAsks, VllmCall, lora_request
from ..vllm_environment import import_vllm
from .core_pulse import CorePulse
from .host_protocol import (
    Abandoned,
    Abort,
    Answered,
    Beat,
    Begin,
    Died,
    Failed,
    FromHost,
    Generate,
    Load,
    Quit,
    Ready,
    Swapped,
    Text,
    Unload,
    to_host,
    to_line,
)
from .processes import descendants

__all__ = ["EngineHost"]

_LINE_LIMIT_BYTES = 1 << 26
_HEALTH_PERIOD_S = 0.2
_FAREWELL_S = 0.5


class EngineHost:
    """AsyncLLM behind the lines of `host_protocol`.

    CPU seconds are those of all engine processes, this one included, read when the engine's outputs arrive and
    split over the asks in them. Prompt tokens are booked with the first token, so a long prompt computed in
    several steps beside other asks is charged a little too little, and they a little too much.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._meter = CpuMeter()
        self._clock = ProcessesClock(())
        self._abandoned: dict[str, float] = {}
        self._generated = Counter[str]()
        self._counts = {"steps": 0, "prefill": 0, "decode": 0, "asks": 0, "loads": 0, "evictions": 0}
        self._start_s = self._start_cpu_s = 0.0
        self._name = ""
        self._llm: Any = None
        self._asks: VllmAsks
        self._calls: dict[int, VllmCall] = {}
        self._children: list[Any] = []

    async def run(self) -> int:
        """Serve until a `Quit` message; returns the process's exit status."""
        begin = to_host(await self._reader.readline())
        assert isinstance(begin, Begin)
        try:
            pids = self._build(begin)
        except Exception as error:
            known = error if isinstance(error, MetierError) else not_started(begin.weights, error)
            self._send(Failed.from_error(0, known))
            await self._writer.drain()
            return 1
        self._send(Ready(pids=pids, counters=self._counters()))
        health = asyncio.create_task(self._watch_health())
        # The question goes through the queue that asks go through, so that a core that is stopped cannot answer it.
        pulse = CorePulse(self._llm.is_sleeping, pids[1:], begin.settings, lambda: self._send(Beat()))
        beating = asyncio.create_task(pulse.run())
        serving = asyncio.create_task(self._serve())
        try:
            done, _ = await asyncio.wait((health, serving), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if health in done:
                self._send(Died(reason=f"a process of it {self._how_ended()}"))
                await self._writer.drain()
            return int(health in done)
        finally:
            for task in (health, beating, serving, *self._tasks.values()):
                task.cancel()
            # The engine holds nothing that has to be saved, so it is not shut down slowly.
            self._llm.shutdown(timeout=_FAREWELL_S)

    def _build(self, begin: Begin) -> tuple[int, ...]:
        began_s = time.monotonic()
        # One process for scheduler and model: vLLM's CPU platform otherwise adds a worker process that costs
        # another start and a hop at every step.
        guard_children()
        import_vllm(threads=begin.settings.thread_count, in_process=begin.settings.one_process)
        from vllm.v1.engine.async_llm import AsyncLLM

        args = engine_arguments(begin.weights, dtype=begin.dtype, settings=begin.settings, adapters=begin.adapters)
        self._name = begin.name
        self._llm = AsyncLLM.from_engine_args(args)
        self._llm.logger_manager = None
        context_tokens = self._llm.model_config.max_model_len
        self._asks = VllmAsks(self._llm.get_tokenizer(), begin.settings, context_tokens=context_tokens)
        self._watch_outputs()
        pids = (os.getpid(), *descendants(os.getpid()))
        self._children = multiprocessing.active_children()
        self._clock = ProcessesClock(pids)
        self._start_cpu_s = self._clock.lap()
        self._start_s = time.monotonic() - began_s
        return pids

    async def _serve(self) -> None:
        while line := await self._reader.readline():
            message = to_host(line)
            match message:
                case Generate():
                    if not self._tasks:
                        # Idle processes tick over; that is no ask's work.
                        self._meter.charge_overhead(self._clock.lap())
                    self._spawn(message.key, self._answer(message))
                case Load() | Unload():
                    self._spawn(message.key, self._swap(message))
                case Abort(key=key):
                    if key in self._tasks:
                        self._tasks[key].cancel()
                case Quit():
                    return

    def _spawn(self, key: int, work: Any) -> None:
        task = self._tasks[key] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def _watch_health(self) -> None:
        while not self._llm.errored:  # noqa: ASYNC110 - vLLM sets a flag, it offers nothing to await
            await asyncio.sleep(_HEALTH_PERIOD_S)

    # -- asks --------------------------------------------------------------------------------------------

    async def _answer(self, message: Generate) -> None:
        key = message.key
        try:
            reply = await self._generate(message)
        except asyncio.CancelledError:
            usage = self._write_off(message)
            self._send(Abandoned(key=key, usage=usage, counters=self._counters()))
        except Exception as error:
            usage = self._write_off(message)
            self._send(Failed.from_error(key, self._as_ours(message, error), usage, self._counters()))
        else:
            self._counts["asks"] += 1
            self._send(Answered(key=key, reply=reply, counters=self._counters()))
        finally:
            self._calls.pop(key, None)
            del self._generated[str(key)]

    async def _generate(self, message: Generate) -> Reply:
        submitted_s, ask, key = time.monotonic(), message.ask, str(message.key)
        request = EngineRequest(ask, message.adapter, message.intuition)
        call = self._calls[message.key] = self._asks.prepare(request, stream=message.stream)
        outputs = self._llm.generate(
            call.prompt, call.params, key, lora_request=call.lora, priority=ask.priority, **call.grammar
        )
        async with aclosing(outputs):  # leaving early ends the request in the engine
            async for output in outputs:
                piece = call.read(output)
                if message.stream and piece:
                    self._send(Text(key=message.key, piece=piece))
                if call.reader.full:  # vLLM bounds thinking and answer together only
                    break
        reason = call.finish_reason(output)
        return call.reply(output, reason, submitted_s=submitted_s, cpu_s=self._meter.take(key), engine=self._name)

    def _write_off(self, message: Generate) -> Usage:
        role, cpu_s = message.ask.role, self._meter.take(str(message.key))
        self._abandoned[role] = self._abandoned.get(role, 0.0) + cpu_s
        call = self._calls.get(message.key)
        if call is None:
            return Usage(cpu_s=cpu_s)
        # vLLM hands out nothing of an ask on the way that is not streamed; the engine's own outputs were counted.
        thinking_tokens = call.reader.thinking_tokens
        return Usage(
            prompt_tokens=len(call.prompt_ids),
            thinking_tokens=thinking_tokens,
            answer_tokens=max(call.reader.answer_tokens, self._generated[str(message.key)] - thinking_tokens),
            cpu_s=cpu_s,
        )

    # -- adapters ----------------------------------------------------------------------------------------

    async def _swap(self, message: Load | Unload) -> None:
        adapter, began_s = message.adapter, time.monotonic()
        if isinstance(message, Load):
            try:
                self._asks.trex.admit(adapter)
            except AdapterError as error:
                self._send(Failed.from_error(message.key, error))
                return
        try:
            if isinstance(message, Load):
                await self._llm.add_lora(lora_request(adapter))
                self._counts["loads"] += 1
            else:
                await self._llm.remove_lora(adapter.number)
                self._asks.trex.drop(adapter)
                self._counts["evictions"] += 1
        except Exception as error:
            self._meter.carry_over(self._clock.lap())
            if self._llm.errored:
                death = EngineDeadError(f"the engine died during a swap: a process of it {self._how_ended()}")
                self._send(Failed.from_error(message.key, death))
                return
            if isinstance(message, Load):
                self._asks.trex.drop(adapter)
                await self._llm.remove_lora(adapter.number)
            self._send(Failed.from_error(message.key, adapter_refused(adapter, str(error))))
            return
        # The engine swaps between two steps; the lap began with the outputs of the step before.
        cpu_s = self._clock.lap()
        self._meter.total_s += cpu_s
        cost = {"wall_s": time.monotonic() - began_s, "cpu_s": cpu_s}
        self._send(Swapped.model_validate({"key": message.key, "cost": cost, "counters": self._counters()}))

    # -- accounts ----------------------------------------------------------------------------------------

    def _watch_outputs(self) -> None:
        """Charge each batch of outputs as it arrives, before vLLM turns it into replies."""
        processor = self._llm.output_processor
        process = processor.process_outputs

        def charging(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            rows = []
            for output in outputs:
                state = processor.request_states.get(output.request_id)
                if state is None:
                    continue
                prefill = 0
                if state.is_prefilling:
                    stats = output.prefill_stats
                    prefill = state.prompt_len - (stats.num_cached_tokens if stats is not None else 0)
                decode = len(output.new_token_ids) - bool(prefill)
                rows.append(StepRow(state.external_req_id, max(prefill, 0), max(decode, 0)))
                self._generated[state.external_req_id] += len(output.new_token_ids)
            if outputs:
                self._counts["steps"] += 1
                self._counts["prefill"] += sum(row.prefill_tokens for row in rows)
                self._counts["decode"] += sum(row.decode_tokens for row in rows)
                self._meter.charge_step(rows, self._clock.lap())
            return process(outputs, *args, **kwargs)

        processor.process_outputs = charging

    def _counters(self) -> EngineCounters:
        counts = self._counts
        return EngineCounters(
            name=self._name,
            cpu_s=self._meter.total_s,
            abandoned_cpu_s=dict(self._abandoned),
            overhead_cpu_s=self._meter.overhead_s,
            start_s=self._start_s,
            start_cpu_s=self._start_cpu_s,
            steps=counts["steps"],
            prefill_tokens=counts["prefill"],
            decode_tokens=counts["decode"],
            asks=counts["asks"],
            adapter_loads=counts["loads"],
            adapter_evictions=counts["evictions"],
        )

    def _send(self, message: FromHost) -> None:
        self._writer.write(to_line(message))

    # -- errors ------------------------------------------------------------------------------------------

    def _as_ours(self, message: Generate, error: Exception) -> MetierError:
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError
        from vllm.v1.engine.exceptions import EngineGenerateError

        if isinstance(error, VllmDeadError):
            return EngineDeadError(f"the engine died while it answered: a process of it {self._how_ended()}")
        # AsyncLLM wraps what is wrong with one ask, except for what its own validation finds.
        cause = error.__cause__ if isinstance(error, EngineGenerateError) else None
        return ask_error(message.ask, cause if isinstance(cause, Exception) else error)

    def _how_ended(self) -> str:
        return how_ended(child.exitcode for child in self._children)


async def _main(descriptor: int) -> int:
    link = socket.socket(fileno=descriptor)
    reader, writer = await asyncio.open_connection(sock=link, limit=_LINE_LIMIT_BYTES)
    return await EngineHost(reader, writer).run()


if __name__ == "__main__":
    status = asyncio.run(_main(int(sys.argv[1])))
    # Taking torch and vLLM apart takes seconds and achieves nothing: the engine's processes are gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
