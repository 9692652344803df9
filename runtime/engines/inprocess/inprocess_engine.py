"""vLLM's engine inside this process, stepped by a thread of ours: ready in seconds, gone with the program.

For demos, tests and scripts. The supervised engine is the form whose crash does not end the program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread

from ....agents.backend import OnText, ResumedText
from ....agents.errors import MetierError
from ....agents.messages import Reply
from ...closing import WarnsWhenOpen
from ...settings.engine import EngineSettings
from ...slots.adapter import LoadedAdapter, SwapCost
from ..engine import EngineCounters, EngineRequest
from ..engine_errors import engine_closed, not_started
from ..loop_mailbox import Mailboxes, Promise
from .pending_ask import PendingAsk
from .stepped_llm import SteppedLLM
from .stepping_thread import SteppingThread

__all__ = ["InProcessEngine"]

T = TypeVar("T")


class InProcessEngine(WarnsWhenOpen):
    """An `Engine` on vLLM's LLMEngine. Make it with `start`; several may live in one process.

    This class is the event loop's side, `SteppedLLM` the thread's. vLLM tears down process-wide state when one
    of its engines is deleted, so `close` frees this engine's memory without vLLM's own finaliser; the process
    keeps that (small) state until it ends.
    """

    def __init__(self, name: str, settings: EngineSettings) -> None:
        self.name = name
        self._thread = SteppingThread.acquire()
        self._llm = SteppedLLM(name, settings, self._thread)
        self._mailboxes = Mailboxes()
        self._keys = itertools.count(1)
        self._closed = False

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
            await engine._in_thread(partial(engine._llm.build, weights, adapters, dtype))
        except BaseException as error:
            await engine.close()
            if isinstance(error, MetierError) or not isinstance(error, Exception):
                raise
            raise not_started(weights, error) from error
        return engine

    async def generate(self, request: EngineRequest, on_text: OnText | None = None) -> Reply:
        """See `Engine.generate`."""
        self._check_open()
        streamed = on_text if on_text is None or isinstance(on_text, ResumedText) else ResumedText(on_text)
        key = f"{request.ask.role}-{next(self._keys)}"
        pending = PendingAsk(key, request, self._mailboxes.here(), Promise(), streamed)
        self._thread.submit(partial(self._llm.admit, pending))
        try:
            return await pending.promise.wait()
        except BaseException:
            self._thread.submit(partial(self._llm.abandon, pending))
            raise

    async def add_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.add_adapter`."""
        self._check_open()
        return await self._in_thread(partial(self._llm.load_adapter, adapter))

    async def remove_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.remove_adapter`."""
        self._check_open()
        return await self._in_thread(partial(self._llm.unload_adapter, adapter))

    def write_off(self, role: str, cpu_s: float) -> None:
        """See `Engine.write_off`."""
        self._llm.write_off(role, cpu_s)

    def counters(self) -> EngineCounters:
        """See `Engine.counters`; may be a step behind."""
        llm = self._llm
        return EngineCounters(
            name=self.name,
            cpu_s=llm.meter.total_s,
            abandoned_cpu_s=dict(llm.abandoned),
            overhead_cpu_s=llm.meter.overhead_s,
            busy_s=llm.busy_s,
            start_s=llm.start_s,
            start_cpu_s=llm.start_cpu_s,
            steps=llm.steps,
            prefill_tokens=llm.rows.prefill_tokens,
            decode_tokens=llm.rows.decode_tokens,
            asks=llm.asks,
            adapter_loads=llm.loads,
            adapter_evictions=llm.evictions,
        )

    async def close(self) -> None:
        """Abort what runs, free weights and cache, and stop the thread if no other engine needs it."""
        if self._closed:
            return
        self._closed = True
        # Also when cancelled: a thread that goes on would deliver to an event loop that is gone.
        with anyio.CancelScope(shield=True):
            await self._in_thread(self._llm.dismantle)
            await anyio.to_thread.run_sync(self._thread.release)

    def _check_open(self) -> None:
        if self._closed:
            raise engine_closed(self.name)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in the stepping thread and wait for what it returns or raises."""
        mailbox, promise = self._mailboxes.here(), Promise[T]()

        def job() -> None:
            try:
                mailbox.post(partial(promise.succeed, work()))
            except Exception as error:
                mailbox.post(partial(promise.fail, error))
            mailbox.flush()

        self._thread.submit(job)
        return await promise.wait()
