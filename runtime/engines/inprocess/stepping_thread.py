"""The one thread that touches vLLM in this process: builds engines, steps them in turn, runs their jobs."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from ...meters.cpu_clock import ThreadFamilyClock

__all__ = ["Steppable", "SteppingThread"]

_log = logging.getLogger(__name__)


class Steppable(Protocol):
    """An engine as the stepping thread sees it; every method is called in that thread."""

    def has_work(self) -> bool:
        """Whether there is anything to step."""
        ...

    def step(self) -> None:
        """Advance all running asks by one token, or part of a prompt. Must not raise."""
        ...

    def give_up(self, error: Exception) -> None:
        """Fail every ask: this engine will not be stepped again."""
        ...

    def charge_idle(self, cpu_s: float) -> None:
        """Take CPU seconds used between work (OpenMP workers spin for a while after a step)."""
        ...


class SteppingThread:
    """A thread shared by all in-process engines of this process.

    vLLM keeps the running forward pass in a module-level variable, so two engines must never step at once;
    one thread for all makes that so, and gives them one pool of OpenMP workers. It starts with the first
    `acquire` and ends with the last `release`.
    """

    _shared: SteppingThread | None = None
    _holders = 0
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._engines: list[Steppable] = []
        self._last: Steppable | None = None
        self._read_s = 0.0
        self._clock: ThreadFamilyClock | None = None
        # A daemon, so that a program that forgot to close can still end; `stop_at_exit` has it joined first.
        self._thread = threading.Thread(target=self._run, name="metier-engine", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls) -> SteppingThread:
        """Return the running thread, started if there is none."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls()
            cls._holders += 1
            return cls._shared

    def release(self) -> None:
        """Give up one hold; the last stops the thread and waits for the step under way to end."""
        cls = type(self)
        with cls._lock:
            cls._holders -= 1
            if cls._holders > 0:
                return
            cls._shared = None
        self.stop()

    def stop(self) -> None:
        """Stop after the step under way, and wait for that; harmless when it has stopped."""
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @classmethod
    def stop_at_exit(cls) -> None:
        """Make a program end cleanly that forgets to close; call after vLLM is imported.

        Exit handlers run in reverse order, and stepping while the interpreter takes vLLM and torch apart ends in
        tracebacks, so ours has to be registered after theirs.
        """
        atexit.unregister(_stop)
        atexit.register(_stop)

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` in the thread before the next step; callable from any thread."""
        self._jobs.put(job)

    def attach(self, engine: Steppable) -> None:
        """Step this engine from now on (call in the thread)."""
        self._engines.append(engine)

    def detach(self, engine: Steppable) -> None:
        """Step this engine no more (call in the thread)."""
        if engine in self._engines:
            self._engines.remove(engine)
        if self._last is engine:
            self._last = None

    def lap(self) -> float:
        """CPU seconds of the thread and its workers since the last lap (call in the thread)."""
        assert self._clock is not None
        now = self._clock.read()
        lap, self._read_s = now - self._read_s, now
        return lap

    def _run(self) -> None:
        self._clock = ThreadFamilyClock()
        self._read_s = self._clock.read()
        while True:
            if not self._run_jobs(wait=not any(engine.has_work() for engine in self._engines)):
                return
            for engine in [engine for engine in self._engines if engine.has_work()]:
                self._last = engine
                try:
                    engine.step()
                except Exception as error:
                    # Not a failed step, which the engine handles: a bug of ours. The other engines go on.
                    _log.exception("an engine's step went wrong outside vLLM")
                    self.detach(engine)
                    engine.give_up(error)

    def _run_jobs(self, *, wait: bool) -> bool:
        """Run what is queued; with `wait`, sleep until there is something. False when asked to stop."""
        while True:
            try:
                job = self._jobs.get(block=wait)
            except queue.Empty:
                return True
            if wait and self._last is not None:
                self._last.charge_idle(self.lap())
            wait = False
            if job is None:
                return False
            try:
                job()
            except Exception:
                # Jobs report their own failures; whatever slips through must not end the thread, because
                # every ask of every engine would wait for ever.
                _log.exception("a job of the engine thread failed")


def _stop() -> None:
    thread = SteppingThread._shared
    if thread is not None:
        thread.stop()
