"""vLLM's engine inside this process, stepped by a thread of ours: ready in seconds, gone with the program.

For demos, tests and scripts. `supervised_engine` is the form whose death does not take the program along.
"""

from __future__ import annotations

import gc
import itertools
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from ..agents.backend import OnText
from ..agents.errors import AdapterError, EngineError, MetierError
from ..agents.messages import Ask, Reply, Usage
from .engine import (
    EngineCounters,
    EngineRequest,
    LoadedAdapter,
    ResumedText,
    SwapCost,
    engine_arguments,
    finish_reason,
    prompt_token_ids,
    rejected,
    sampling_params,
    stopwatch_usage,
)
from .engine_settings import EngineSettings
from .loop_mailbox import LoopMailbox, Promise
from .meter import CpuMeter
from .scheduled_rows import ScheduledRows
from .stepping_thread import SteppingThread
from .vllm_environment import import_vllm

__all__ = ["InProcessEngine"]

T = TypeVar("T")

# An ask whose step failed runs once more, alone: if the step fails again, this ask is the one that breaks it.
_ATTEMPTS = 2


@dataclass(eq=False)
class _Pending:
    """An ask inside the engine. Everything but `promise` is touched by the stepping thread only."""

    key: str
    request: EngineRequest
    mailbox: LoopMailbox
    promise: Promise[Reply]
    on_text: ResumedText | None
    submitted_s: float = field(default_factory=time.monotonic)
    token_ids: list[int] = field(default_factory=list)
    vllm_id: str = ""
    failures: int = 0
    answer_tokens: int = 0
    pieces: list[str] = field(default_factory=list)
    gone: bool = False
    late: Usage | None = None  # of the reply, in case its asker has gone when it arrives


class InProcessEngine:
    """An `Engine` on vLLM's LLMEngine. Make it with `start`; several may live in one process.

    vLLM tears down process-wide state when one of its engines is deleted, so `close` frees this engine's
    memory without letting vLLM's own finaliser run; the process keeps that (small) state until it ends.
    """

    def __init__(self, name: str, settings: EngineSettings) -> None:
        self.name = name
        self._settings = settings
        self._thread = SteppingThread.acquire()
        self._mailboxes: dict[int, LoopMailbox] = {}
        self._keys = itertools.count(1)
        self._closed = False
        self._accounts = threading.Lock()  # the swaps are written off by the event loop's thread
        # Below: the stepping thread's.
        self._llm: Any = None
        self._tokenizer: Any = None
        self._context_tokens = 0
        self._live: dict[str, _Pending] = {}
        self._held: deque[_Pending] = deque()
        self._suspects: deque[_Pending] = deque()
        self._trial: _Pending | None = None
        self._meter = CpuMeter()
        self._rows = ScheduledRows()
        self._abandoned: dict[str, float] = {}
        self._counts = {"asks": 0, "steps": 0, "loads": 0, "evictions": 0}
        self._start_s = self._start_cpu_s = 0.0

    @classmethod
    async def start(
        cls, weights: Path, settings: EngineSettings, *, adapters: bool, dtype: str = "auto", name: str = "engine"
    ) -> InProcessEngine:
        """Start an engine on the checkpoint folder `weights` and wait until it can answer.

        `adapters=False` starts it without LoRA layers, which is faster at every step.
        Raises: PluginError, and EngineError with vLLM's reason when the engine does not start.
        """
        engine = cls(name, settings)
        try:
            await engine._in_thread(partial(engine._build, weights, adapters, dtype))
        except BaseException as error:
            await engine.close()
            if isinstance(error, MetierError) or not isinstance(error, Exception):
                raise
            raise EngineError(
                f"the engine on {weights} does not start: {error}",
                expected="a checkpoint and settings that vLLM accepts",
                remedy="Check the folder with `metier doctor`, and the engine settings against free memory.",
            ) from error
        return engine

    async def generate(self, request: EngineRequest, on_text: OnText | None = None) -> Reply:
        """See `Engine.generate`."""
        self._check_open()
        pending = _Pending(
            key=f"{request.ask.role}-{next(self._keys)}",
            request=request,
            mailbox=self._mailbox(),
            promise=Promise(),
            on_text=None if on_text is None else ResumedText(on_text),
        )
        self._thread.submit(partial(self._admit_or_fail, pending))
        try:
            return await pending.promise.wait()
        except BaseException:
            self._thread.submit(partial(self._abandon, pending))
            raise

    async def add_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.add_adapter`."""
        self._check_open()
        return await self._in_thread(partial(self._load_adapter, adapter))

    async def remove_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.remove_adapter`."""
        self._check_open()
        return await self._in_thread(partial(self._unload_adapter, adapter))

    def write_off(self, role: str, cpu_s: float) -> None:
        """See `Engine.write_off`."""
        with self._accounts:
            self._abandoned = {**self._abandoned, role: self._abandoned.get(role, 0.0) + cpu_s}

    def counters(self) -> EngineCounters:
        """See `Engine.counters`; may be a step behind."""
        return EngineCounters(
            name=self.name,
            cpu_s=self._meter.total_s,
            abandoned_cpu_s=dict(self._abandoned),
            overhead_cpu_s=self._meter.overhead_s,
            start_s=self._start_s,
            start_cpu_s=self._start_cpu_s,
            steps=self._counts["steps"],
            prefill_tokens=self._rows.prefill_tokens,
            decode_tokens=self._rows.decode_tokens,
            asks=self._counts["asks"],
            adapter_loads=self._counts["loads"],
            adapter_evictions=self._counts["evictions"],
        )

    async def close(self) -> None:
        """Abort what runs, free weights and cache, and stop the thread if no other engine needs it."""
        if self._closed:
            return
        self._closed = True
        # Also when cancelled: a thread left stepping would outlive what it delivers to.
        with anyio.CancelScope(shield=True):
            await self._in_thread(self._dismantle)
            await anyio.to_thread.run_sync(self._thread.release)

    async def __aenter__(self) -> InProcessEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if not getattr(self, "_closed", True):
            _warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2)

    # -- event loop side ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise _closed(self.name)

    def _mailbox(self) -> LoopMailbox:
        mailbox = LoopMailbox()
        # One per loop: a test suite, or a program with two loops, may use one engine from both.
        return self._mailboxes.setdefault(id(mailbox.loop), mailbox)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in the stepping thread and wait for what it returns or raises."""
        mailbox, promise = self._mailbox(), Promise[T]()

        def job() -> None:
            try:
                mailbox.post(partial(promise.succeed, work()))
            except Exception as error:
                mailbox.post(partial(promise.fail, error))
            mailbox.flush()

        self._thread.submit(job)
        return await promise.wait()

    def _pass_text(self, pending: _Pending, on_text: ResumedText, piece: str) -> None:
        try:
            on_text(piece)
        except Exception as error:  # the caller's own; it ends the caller's ask, not the loop's delivery
            pending.promise.fail(error)

    # -- stepping thread side ----------------------------------------------------------------------------

    def has_work(self) -> bool:
        """See `Steppable`."""
        return bool(self._live or self._suspects or self._held)

    def charge_idle(self, cpu_s: float) -> None:
        """See `Steppable`."""
        self._meter.charge_overhead(cpu_s)

    def step(self) -> None:
        """See `Steppable`."""
        self._admit_waiting()
        self._rows.clear()
        outputs, failure = [], None
        try:
            outputs = self._llm.step()
        except Exception as error:
            failure = error
        self._counts["steps"] += 1
        rows = self._rows.of_last_step()
        self._meter.charge_step(rows, self._thread.lap())
        if failure is not None:
            self._quarantine(failure, {row.key for row in rows} or set(self._live))
        for output in outputs:
            try:
                self._deliver(output)
            except Exception as error:
                if pending := self._live.get(output.request_id):
                    self._fail(pending, _broken(pending.request.ask, error, "Report it, with this traceback."))
        self._flush()

    def _build(self, weights: Path, adapters: bool, dtype: str) -> None:
        began_s = time.monotonic()
        import_vllm(threads=self._settings.thread_count, in_process=True)
        import torch
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        set_num_threads = torch.set_num_threads
        set_num_threads(self._settings.thread_count)
        args = engine_arguments(weights, dtype=dtype, settings=self._settings, adapters=adapters)
        self._thread.lap()  # imports happen once per process and are no engine's own cost
        config = args.create_engine_config()
        try:
            self._llm = LLMEngine(config, Executor.get_class(config), log_stats=True, multiprocess_mode=False)
        finally:
            # vLLM's CPU worker disables this function for the whole process; training beside us needs it.
            torch.set_num_threads = set_num_threads
        # Prometheus and log lines per step are for servers; timestamps in the outputs need only log_stats.
        self._llm.logger_manager = None
        self._tokenizer = self._llm.get_tokenizer()
        self._context_tokens = config.model_config.max_model_len
        self._rows.watch(self._llm.engine_core.engine_core.scheduler)
        self._thread.attach(self)
        self._start_s = time.monotonic() - began_s
        self._start_cpu_s = self._thread.lap()

    def _admit_or_fail(self, pending: _Pending) -> None:
        if self._closed or pending.gone:
            self._fail(pending, _closed(self.name))
        elif self._trial is not None or self._suspects:
            self._held.append(pending)
            return
        else:
            self._admit(pending)
        self._flush()

    def _admit(self, pending: _Pending) -> None:
        """Hand an ask to vLLM; whatever is wrong with it is its own failure only."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.lora.request import LoRARequest

        ask, adapter = pending.request.ask, pending.request.adapter
        try:
            if not pending.token_ids:
                pending.token_ids = prompt_token_ids(self._tokenizer, ask, context_tokens=self._context_tokens)
            lora = None if adapter is None else LoRARequest(adapter.id, adapter.number, str(adapter.path))
            pending.vllm_id = self._llm.add_request(
                pending.key,
                tokens_input(pending.token_ids),
                sampling_params(ask, stream=pending.on_text is not None),
                lora_request=lora,
                priority=ask.priority,
            )
        except MetierError as error:
            self._fail(pending, error)
        except (VLLMClientError, ValueError, TypeError) as error:
            refusal = rejected(ask, str(error))
            refusal.__cause__ = error
            self._fail(pending, refusal)
        except Exception as error:
            self._fail(pending, _broken(ask, error, "Report it: the engine could not even take the ask."))
        else:
            self._live[pending.key] = pending
            self._rows.name(pending.vllm_id, pending.key)
        self._meter.charge(pending.key, self._thread.lap())

    def _deliver(self, output: Any) -> None:
        """Pass on what a step wrote for one ask: a piece of its text, or its whole reply."""
        pending = self._live.get(output.request_id)
        if pending is None:
            return
        said = output.outputs[0]
        pending.answer_tokens += len(said.token_ids)
        pending.pieces.append(said.text)
        if said.text and pending.on_text is not None:
            pending.mailbox.post(partial(self._pass_text, pending, pending.on_text, said.text))
        if not output.finished:
            return
        ask, adapter = pending.request.ask, pending.request.adapter
        try:
            reason = finish_reason(ask, said.finish_reason)
        except EngineError as error:
            self._fail(pending, error)
            return
        usage = stopwatch_usage(
            output,
            submitted_s=pending.submitted_s,
            answer_tokens=pending.answer_tokens,
            cpu_s=self._meter.take(pending.key),
        )
        reply = Reply(
            text="".join(pending.pieces),
            finish_reason=reason,
            usage=usage,
            variant=ask.variant if adapter is None else adapter.id,
            engine=self.name,
        )
        self._forget(pending)
        pending.late = usage
        self._counts["asks"] += 1
        pending.mailbox.post(partial(pending.promise.succeed, reply))

    def _fail(self, pending: _Pending, error: MetierError) -> None:
        """End an ask with an error; what it used stays on its role's account."""
        self._write_off(pending)
        pending.mailbox.post(partial(pending.promise.fail, error))

    def _abandon(self, pending: _Pending) -> None:
        """Abort an ask nobody waits for any more; a reply that came too late is written off too."""
        if pending.late is not None:
            self._account_abandoned(pending, pending.late)
            pending.late = None
        if pending.gone:
            self._flush()
            return
        if pending.key in self._live:
            self._llm.abort_request([pending.vllm_id], internal=True)
        for waiting in (self._held, self._suspects):
            if pending in waiting:
                waiting.remove(pending)
        self._write_off(pending)
        self._flush()

    def _write_off(self, pending: _Pending) -> None:
        if pending.gone:
            return
        self._forget(pending)
        cpu_s = self._meter.take(pending.key)
        tokens = len(pending.token_ids)
        self._account_abandoned(pending, Usage(prompt_tokens=tokens, answer_tokens=pending.answer_tokens, cpu_s=cpu_s))

    def _account_abandoned(self, pending: _Pending, usage: Usage) -> None:
        self.write_off(pending.request.ask.role, usage.cpu_s)
        if pending.request.on_abandoned is not None:
            pending.mailbox.post(partial(pending.request.on_abandoned, pending.request.ask, usage))

    def _forget(self, pending: _Pending) -> None:
        pending.gone = True
        self._live.pop(pending.key, None)
        self._rows.forget(pending.vllm_id)
        if self._trial is pending:
            self._trial = None

    def _quarantine(self, error: Exception, blamed: set[Hashable]) -> None:
        """After a failed step: whoever was in it runs once more, alone; whoever was not waits meanwhile.

        vLLM loses the requests of a step that raises, so all are withdrawn. The one that breaks the step when
        it is alone fails with the error; the others never notice.
        """
        self._trial = None
        withdrawn = list(self._live.values())
        self._live.clear()
        self._llm.abort_request([p.vllm_id for p in withdrawn], internal=True)
        for pending in withdrawn:
            self._rows.forget(pending.vllm_id)
            if pending.key not in blamed:
                self._held.append(pending)
                continue
            pending.failures += 1
            if pending.failures < _ATTEMPTS:
                self._suspects.append(pending)
                continue
            remedy = "It failed twice, the second time alone; the ask's schema or adapter is the likely cause."
            self._fail(pending, _broken(pending.request.ask, error, remedy))

    def _admit_waiting(self) -> None:
        """Admit the next suspect when nothing else runs; the held ones when no suspect is left."""
        if self._suspects and not self._live:
            self._trial = self._suspects.popleft()
            self._again(self._trial)
        while self._held and self._trial is None and not self._suspects:
            self._again(self._held.popleft())

    def _again(self, pending: _Pending) -> None:
        pending.pieces.clear()
        pending.answer_tokens = 0
        if pending.on_text is not None:
            pending.mailbox.post(pending.on_text.restart)
        self._admit(pending)

    def _load_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        from vllm.lora.request import LoRARequest

        began_s = time.monotonic()
        self._meter.charge_overhead(self._thread.lap())
        try:
            loaded = self._llm.add_lora(LoRARequest(adapter.id, adapter.number, str(adapter.path)))
        except Exception as error:
            # vLLM keeps a half-loaded adapter registered and would answer "loaded" the next time.
            self._llm.remove_lora(adapter.number)
            self._meter.charge_overhead(self._thread.lap())
            raise _adapter_refused(adapter, str(error)) from error
        if not loaded:
            raise _adapter_refused(adapter, "it answers that nothing was loaded")
        self._counts["loads"] += 1
        return self._swap_cost(began_s)

    def _unload_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        began_s = time.monotonic()
        self._meter.charge_overhead(self._thread.lap())
        self._llm.remove_lora(adapter.number)
        self._counts["evictions"] += 1
        return self._swap_cost(began_s)

    def _swap_cost(self, began_s: float) -> SwapCost:
        cpu_s = self._thread.lap()
        # On the total now; AdapterSlots puts it on the account of the ask that caused it.
        self._meter.total_s += cpu_s
        return SwapCost(wall_s=time.monotonic() - began_s, cpu_s=cpu_s)

    def _dismantle(self) -> None:
        """Abort everything and free this engine's memory, leaving vLLM's process-wide state to the others."""
        self._thread.detach(self)
        for pending in [*self._live.values(), *self._held, *self._suspects]:
            self._fail(pending, _closed(self.name))
        self._held.clear()
        self._suspects.clear()
        self._flush()
        llm, self._llm, self._tokenizer = self._llm, None, None
        if llm is None:
            return
        # The finaliser would destroy the process groups that the other engines of this process stand on.
        llm.engine_core._finalizer.detach()
        core = llm.engine_core.engine_core
        core.structured_output_manager.clear_backend()
        core.scheduler.shutdown()
        core.model_executor.shutdown()
        self._rows.unwatch()
        del core, llm
        # vLLM hides what exists at start from the garbage collector; without this the memory stays.
        gc.unfreeze()
        gc.collect()

    def _flush(self) -> None:
        for mailbox in list(self._mailboxes.values()):
            mailbox.flush()


def _broken(ask: Ask, error: Exception, remedy: str) -> EngineError:
    failure = EngineError(
        f"the engine failed on the ask of role {ask.role!r} at step {ask.step_path!r}: {error!r}",
        expected="a step that runs",
        remedy=remedy,
    )
    failure.__cause__ = error
    return failure


def _closed(name: str) -> EngineError:
    return EngineError(
        f"engine {name!r} is closed", expected="an open session", remedy="Ask inside `async with open_session`."
    )


def _adapter_refused(adapter: LoadedAdapter, reason: str) -> AdapterError:
    return AdapterError(
        f"the engine refuses adapter {adapter.id!r} in {adapter.path}: {reason}",
        expected="an adapter made for this base, of a rank the slots have room for",
        remedy="Verify the variant, or make it again with `metier make`.",
    )
