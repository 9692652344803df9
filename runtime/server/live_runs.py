"""The runs that go on in this server: one owner, who can stop them and knows how they ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ...agents.errors import MetierError, RunTakenError
from ..events import Event
from ..runs.session import Session
from ..settings.limits import RunLimits
from .admission import Admission
from .error_replies import RequestRefused, log
from .served_models import ServedWorkflow

__all__ = ["LiveRuns"]


class LiveRuns:
    """Starts, stops and resumes runs; `tasks` holds those that go on without a client waiting for them."""

    def __init__(self, session: Session, admission: Admission) -> None:
        self._session = session
        self._admission = admission
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._idle = anyio.Event()
        self.tasks: TaskGroup | None = None

    async def wait_idle(self) -> None:
        """Wait until no run goes on."""
        if self._scopes:
            await self._idle.wait()

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._scopes

    async def go(self, served: ServedWorkflow, run_id: str) -> Any:
        """Start a prepared run, or go on with one, and return its output.

        A run whose caller is cancelled is stopped; it can be resumed. Raises: what `Session.resume` raises, and
        RequestRefused when it runs already or is cancelled meanwhile.
        """
        scope = self._claim(run_id)
        return await self._go(scope, run_id, partial(self._session.resume, served.graph, run_id))

    def start(self, served: ServedWorkflow, run_id: str, limits: RunLimits | None = None) -> None:
        """The same, without waiting for it and with text among its events.

        Raises: RequestRefused as `go` does, and when the queue is full.
        """
        assert self.tasks is not None
        self._admission.check()
        scope = self._claim(run_id)
        resume = partial(self._session.resume, served.graph, run_id, limits=limits, stream=True)

        async def work() -> None:
            try:
                async with self._admission.enter():
                    await self._go(scope, run_id, resume)
            except MetierError as error:  # the store and the events say so
                if run_id in self._scopes:  # it did not come to begin
                    self._release(run_id)
                    self._stopped(run_id, str(error))
            except Exception as error:
                log.error("run %s ended in an unforeseen error", run_id, exc_info=error)
                self._stopped(run_id, f"unforeseen {type(error).__name__}")

        self.tasks.start_soon(work)

    def cancel(self, run_id: str) -> bool:
        """Stop a run; returns whether it was going on."""
        scope = self._scopes.get(run_id)
        if scope is not None:
            scope.cancel()
        return scope is not None

    def _claim(self, run_id: str) -> anyio.CancelScope:
        if run_id in self._scopes:
            raise RequestRefused(
                f"run {run_id} goes on already", status=409, code="run_is_running", remedy="Watch it at …/events."
            )
        if not self._scopes:
            self._idle = anyio.Event()
        scope = self._scopes[run_id] = anyio.CancelScope()
        return scope

    def _release(self, run_id: str) -> None:
        self._scopes.pop(run_id, None)
        if not self._scopes:
            self._idle.set()

    async def _go(self, scope: anyio.CancelScope, run_id: str, resume: Callable[[], Awaitable[Any]]) -> Any:
        try:
            with scope:
                return await resume()
        except Exception:
            raise
        except BaseException:
            self._stopped(run_id, "stopped: who waited for it is gone")
            raise
        finally:
            self._release(run_id)
        self._stopped(run_id, "cancelled")
        raise RequestRefused(
            f"run {run_id} was cancelled", status=409, code="run_cancelled", remedy="Resume it: what is done is kept."
        )

    def _stopped(self, run_id: str, reason: str) -> None:
        """Record why a run has stopped, unless another process has gone on with it meanwhile."""
        store = self._session.store
        with suppress(RunTakenError), store.claim(run_id):
            if store.run(run_id).state != "finished":
                store.end_run(run_id, "stopped", error=reason)
        self._session.emit(Event(kind="run_failed", run_id=run_id, data={"error": reason}))
