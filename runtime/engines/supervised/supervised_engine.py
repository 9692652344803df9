"""vLLM's engine in processes of its own: when it dies, asks get an error and the program goes on."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from ....agents.backend import OnText
from ....agents.errors import EngineDeadError, EngineError
from ....agents.messages import Reply, Usage
from ...closing import WarnsWhenOpen
from ...settings.engine import EngineSettings
from ...slots.adapter import LoadedAdapter, SwapCost
from ..ended_processes import cause_in_log
from ..engine import EngineCounters, EngineRequest
from ..loop_mailbox import LoopMailbox, Mailboxes, Promise, deliver
from .hang_watch import HangWatch
from .host_process import HostProcess
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
    ToHost,
    Unload,
    from_host,
    to_line,
)

__all__ = ["SupervisedEngine"]


@dataclass(eq=False)
class _Waiting:
    """Someone in the event loop who waits for an answer from the host."""

    mailbox: LoopMailbox
    promise: Promise[Any]
    request: EngineRequest | None = None
    on_text: OnText | None = None
    gone: bool = False


class SupervisedEngine(WarnsWhenOpen):
    """An `Engine` in child processes. Make it with `start`.

    A child of ours, the host, runs vLLM's AsyncLLM, whose engine core is a child of the host. Threads talk to it, so
    asyncio and trio are served alike. When any of the processes dies, or hangs for `hang_timeout_s`, the asks under way
    get EngineDeadError and the rest of the processes are ended; starting anew is the pool's decision.
    """

    def __init__(self, name: str, settings: EngineSettings) -> None:
        self.name = name
        self._settings = settings
        self._keys = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._lock = threading.Lock()  # over `_waiting`, `_death` and `_written_off`
        self._death: EngineDeadError | None = None
        self._counters = EngineCounters(name)
        self._written_off: dict[str, float] = {}
        self._mailboxes = Mailboxes()
        self._closed = False
        self._ended_by = ""
        self.pids: tuple[int, ...] = ()
        self._watch = HangWatch(name, settings, self._end_hung)
        self._host = HostProcess(name, settings, on_line=self._hear, on_end=self._host_ended)

    @classmethod
    async def start(
        cls, weights: Path, settings: EngineSettings, *, adapters: bool, dtype: str = "auto", name: str = "engine"
    ) -> SupervisedEngine:
        """Start the processes on the checkpoint folder `weights` and wait until they can answer.

        Raises: PluginError or EngineError with the reason, EngineError after `start_timeout_s`.
        """
        engine = cls(name, settings)
        try:
            waiting = engine._wait_for(0)
            engine._send(Begin(name=name, weights=weights, dtype=dtype, adapters=adapters, settings=settings))
            with anyio.fail_after(settings.start_timeout_s):
                await waiting.promise.wait()
        except BaseException as error:
            log = engine._host.log_tail()
            cause = cause_in_log(log)
            engine._host.kill()
            await engine.close()
            if isinstance(error, TimeoutError | EngineDeadError):
                problem = f"not ready after {settings.start_timeout_s:.0f} s"
                if isinstance(error, EngineDeadError):
                    problem = error.problem
                raise EngineError(
                    f"the supervised engine on {weights} does not start: {problem}. Its last words: {cause or log}",
                    expected="a running engine",
                    remedy="Raise start_timeout_s on a slow machine; otherwise look at what it says.",
                ) from error
            if type(error) is EngineError and cause not in error.problem:
                # vLLM says that the cause is above: in what its processes have printed.
                problem = f"{error.problem}. Its processes said: {cause}"
                raise EngineError(problem, expected=error.expected, remedy=error.remedy) from error
            raise
        return engine

    async def generate(self, request: EngineRequest, on_text: OnText | None = None) -> Reply:
        """See `Engine.generate`."""
        key = next(self._keys)
        waiting = self._wait_for(key, request, on_text)
        stream = on_text is not None
        self._send(
            Generate(key=key, ask=request.ask, adapter=request.adapter, intuition=request.intuition, stream=stream)
        )
        try:
            reply: Reply = await waiting.promise.wait()
        except BaseException:
            # The entry stays until the host says what the ask has used.
            waiting.gone = True
            self._send(Abort(key=key))
            raise
        return reply

    async def add_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.add_adapter`."""
        key = next(self._keys)
        waiting = self._wait_for(key)
        self._send(Load(key=key, adapter=adapter))
        cost: SwapCost = await waiting.promise.wait()
        return cost

    async def remove_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.remove_adapter`."""
        key = next(self._keys)
        waiting = self._wait_for(key)
        self._send(Unload(key=key, adapter=adapter))
        cost: SwapCost = await waiting.promise.wait()
        return cost

    @property
    def dead(self) -> bool:
        """Whether a process of the engine has ended by itself, or hung."""
        with self._lock:
            return self._death is not None

    def write_off(self, role: str, cpu_s: float) -> None:
        """See `Engine.write_off`."""
        with self._lock:
            self._written_off[role] = self._written_off.get(role, 0.0) + cpu_s

    def counters(self) -> EngineCounters:
        """See `Engine.counters`; as of the last reply."""
        abandoned = dict(self._counters.abandoned_cpu_s)
        with self._lock:
            for role, cpu_s in self._written_off.items():
                abandoned[role] = abandoned.get(role, 0.0) + cpu_s
        return replace(self._counters, abandoned_cpu_s=abandoned)

    async def close(self) -> None:
        """End the engine and wait until its processes are gone; closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            self._watch.stop()
            self._send(Quit())
            await anyio.to_thread.run_sync(self._host.end, self.pids[1:])

    # -- event loop side ---------------------------------------------------------------------------------

    def _wait_for(self, key: int, request: EngineRequest | None = None, on_text: OnText | None = None) -> _Waiting:
        waiting = _Waiting(self._mailboxes.here(), Promise(), request, on_text)
        with self._lock:
            if self._death is not None:
                raise _copy(self._death)
            if self._closed:
                raise EngineError(f"engine {self.name!r} is closed", expected="an open session")
            self._waiting[key] = waiting
        return waiting

    def _send(self, message: ToHost) -> None:
        self._host.send(to_line(message))

    # -- the reading thread ------------------------------------------------------------------------------

    def _hear(self, line: bytes) -> None:
        message = from_host(line)
        match message:
            case Beat():
                self._watch.heard()
            case Died(reason=reason):
                self._ended_by = reason
            case _:
                self._take(message)

    def _take(self, message: FromHost) -> None:
        """Hand one message of the host to who waits for it."""
        assert not isinstance(message, Beat | Died)
        if not isinstance(message, Text) and message.counters is not None:
            self._counters = message.counters
        key = 0 if isinstance(message, Ready) else message.key
        with self._lock:
            waiting = self._waiting.get(key)
            if not isinstance(message, Text):
                self._waiting.pop(key, None)
        if waiting is None:
            return
        post, promise = waiting.mailbox.post, waiting.promise
        match message:
            case Ready(pids=pids):
                self.pids = pids
                self._watch.start()
                post(partial(promise.succeed, None))
            case Text(piece=piece):
                assert waiting.on_text is not None
                post(partial(deliver, waiting.on_text, piece, promise))
            case Answered(reply=reply):
                if waiting.gone and waiting.request is not None:  # the reply crossed the cancellation
                    self.write_off(waiting.request.ask.role, reply.usage.cpu_s)
                    self._tell_abandoned(waiting, reply.usage)
                post(partial(promise.succeed, reply))
            case Swapped(cost=cost):
                post(partial(promise.succeed, cost))
            case Failed() | Abandoned():
                self._tell_abandoned(waiting, message.usage)
                if isinstance(message, Failed):
                    error = message.to_error()
                    if isinstance(error, EngineDeadError):
                        self._note_death(error)  # asks hear of it before the host's end does
                    post(partial(promise.fail, error))
        waiting.mailbox.flush()

    def _tell_abandoned(self, waiting: _Waiting, usage: Usage | None) -> None:
        request = waiting.request
        if request is not None and request.on_abandoned is not None and usage is not None:
            waiting.mailbox.post(partial(request.on_abandoned, request.ask, usage))

    def _host_ended(self, how: str) -> None:
        """Fail every waiting ask: the engine is gone."""
        self._watch.stop()
        with self._lock:
            death = EngineDeadError(
                f"engine {self.name!r} is gone: {self._ended_by or f'its host process {how}'}",
                expected="a living engine",
                remedy="The pool starts it again; if it keeps dying, memory is the usual cause.",
            )
            orphans, self._waiting = list(self._waiting.values()), {}
        self._note_death(death)
        for waiting in orphans:
            waiting.mailbox.post(partial(waiting.promise.fail, _copy(death)))
        for mailbox in {waiting.mailbox for waiting in orphans}:
            mailbox.flush()

    def _note_death(self, death: EngineDeadError) -> None:
        with self._lock:
            if not self._closed:
                self._death = death

    # -- the watching thread -----------------------------------------------------------------------------

    def _end_hung(self) -> None:
        """End an engine that gives no sign of life; the reading thread then hears that the host has ended."""
        self._ended_by = f"it gave no sign of life for engine.hang_timeout_s={self._settings.hang_timeout_s:g}"
        self._host.kill(self.pids[1:])


def _copy(error: EngineDeadError) -> EngineDeadError:
    # One object raised in many tasks would gather all their tracebacks.
    return EngineDeadError(error.problem, expected=error.expected, remedy=error.remedy)
