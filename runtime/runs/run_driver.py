"""Runs from their start to their end in the store: each by itself, or many at a time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, Literal

import anyio
from pydantic import ValidationError

from ...agents.backend import Backend
from ...agents.errors import (
    LimitError,
    MetierError,
    ResumeError,
    RunError,
    RunInterrupted,
    RunTakenError,
    StoreError,
    first_error,
)
from ...agents.recorded_values import dump, load
from ...router.route import Router
from ..events import Listeners, RunEvents
from ..settings.session import Settings
from ..store.records import RunRecord
from ..store.store import RunStore
from ..tools.calling import ToolCaller
from .asking import Asker
from .batches import once_mended, waiting_for_person
from .executor import Executor
from .outlook import Outlooks
from .run_plan import RunPlan, RunResult
from .steps import StepRunner
from .tool_loop import BLOCKED
from .unforeseen import named

__all__ = ["RunDriver"]

LOOKS = 2
"""How often a batch looks at a run that another process has: when its turn comes, and once all others are done."""

STOPPED = "stopped before its end"


class RunDriver:
    """Does a session's runs. An error ends its run and is in its result; cancellation alone ends the batch."""

    def __init__(
        self,
        backend: Backend,
        router: Router,
        store: RunStore,
        settings: Settings,
        listeners: Listeners,
        tools: ToolCaller,
    ) -> None:
        self._tools = tools
        self._backend = backend
        self._router = router
        self._store = store
        self._listeners = listeners
        self._outlooks = Outlooks(backend, router, settings)

    async def run_many(self, plans: Sequence[RunPlan], concurrency: int) -> list[RunResult]:
        """Runs of one graph, `concurrency` at a time; results come in the order of the plans.

        Runs that another process is at are left for last. Raises: StoreError when nothing can be recorded any more.
        """
        results: dict[int, RunResult] = {}
        queue = deque(enumerate(plans))

        async def worker() -> None:
            while queue:
                index, plan = queue.popleft()
                results[index] = await self.run(plan, again=lambda: bool(queue))

        async def work_off() -> None:
            async with anyio.create_task_group() as workers:
                for _ in range(min(concurrency, len(queue))):
                    workers.start_soon(worker)

        for _ in range(LOOKS):
            await _unwrapped(work_off())
            queue.extend((i, plans[i]) for i, r in results.items() if isinstance(r.error, RunTakenError))
        return [results[index] for index in range(len(plans))]

    async def run(self, plan: RunPlan, again: Callable[[], bool] = lambda: False) -> RunResult:
        """Do one run, unless another process is doing it; if another has finished it meanwhile, read it back.

        What the plan says of the run may be old by now: another process may have resumed the batch since. So the run
        is looked at inside the claim, and goes on from what is recorded. `again` says whether another run of the
        graph will follow this one.
        """
        with ExitStack() as claims:
            try:
                claims.enter_context(self._store.claim(plan.run_id))
            except RunTakenError as error:
                return RunResult(plan.run_id, error=error)
            now = self._store.run(plan.run_id)
            if now.state == "finished":
                return _finished(plan, now)
            begun = plan.resumed or now.state != "waiting"
            return await self._run_claimed(replace(plan, record=now, resumed=begun), again)

    async def _run_claimed(self, plan: RunPlan, again: Callable[[], bool]) -> RunResult:
        """The score is recorded with the end: a run killed between the two would be finished and never scored."""
        run_id = plan.run_id
        began = time.monotonic()
        self._store.start_run(run_id)
        events = RunEvents(run_id, self._listeners)
        events.emit("run_started", resumed=plan.resumed)
        try:
            with named(RunError, f"run {run_id}", lambda: once_mended(self._store, run_id)):
                output = await self._output(plan, self._executor(plan, events, again))
                text = "null" if output is None else dump(output, plan.graph.gives)[1]
                score = None if plan.score is None else plan.score(output)
        except MetierError as error:
            return self._end_badly(plan, events, error, time.monotonic() - began)
        except (anyio.get_cancelled_exc_class(), KeyboardInterrupt):
            with suppress(StoreError):  # where nothing can be written, that is said already
                self._store.end_run(run_id, "stopped", error=STOPPED, busy_s=time.monotonic() - began)
            raise
        self._store.end_run(run_id, "finished", output=text, score=score, busy_s=time.monotonic() - began)
        events.emit("run_finished", output=text)
        return _told(RunResult(run_id, output, score=score), events)

    def _executor(self, plan: RunPlan, events: RunEvents, again: Callable[[], bool]) -> Executor:
        outlook = self._outlooks.of(plan, again)
        asker = Asker(plan, self._backend, self._router.route, outlook, events)
        return Executor(StepRunner(plan, self._store, asker, self._tools, events), outlook.foresight)

    async def _output(self, plan: RunPlan, executor: Executor) -> Any:
        """The graph's output; raises RunInterrupted when it waits for a person, LimitError when it takes too long."""
        limit_s = plan.limits.max_seconds_s
        with anyio.move_on_after(limit_s or math.inf) as scope:
            output = await _unwrapped(executor.run(plan.graph, plan.value))
        if scope.cancelled_caught:
            raise LimitError(
                f"run {plan.run_id} took longer than max_seconds_s={limit_s}",
                expected="the run to end within its limit",
                remedy="Raise the limit (--max-seconds) and resume the run: what was recorded is kept.",
            )
        if output is BLOCKED:
            raise waiting_for_person(self._store, plan.run_id)
        return output

    def _end_badly(self, plan: RunPlan, events: RunEvents, error: MetierError, busy_s: float) -> RunResult:
        run_id = plan.run_id
        if isinstance(error, RunInterrupted):
            self._store.end_run(run_id, "interrupted", busy_s=busy_s)
            events.emit("run_interrupted", questions=error.questions)
            return RunResult(run_id, error=error)
        state: Literal["stopped", "failed"] = "stopped" if isinstance(error, LimitError) else "failed"
        score = None if plan.score is None else plan.score(None)
        self._store.end_run(run_id, state, error=str(error), score=score, busy_s=busy_s)
        events.emit("run_failed", error=str(error))
        return _told(RunResult(run_id, error=error, score=score), events)


def _finished(plan: RunPlan, now: RunRecord) -> RunResult:
    """The result of a run that another driver has finished."""
    text = now.output or "null"
    try:
        return RunResult(now.id, None if text == "null" else load(text, plan.graph.gives), score=now.score)
    except ValidationError as error:
        problem = f"the recorded output of run {now.id} is no longer what the workflow gives: {error}"
        return RunResult(now.id, error=ResumeError(problem, expected="the types the run was started with"))


def _told(result: RunResult, events: RunEvents) -> RunResult:
    if result.score is not None:
        events.emit("run_scored", score=result.score)
    return result


async def _unwrapped(work: Awaitable[Any]) -> Any:
    """Await, and raise the first error itself rather than the group that task groups wrap it in."""
    try:
        return await work
    except BaseExceptionGroup as group:
        first = first_error(group)
        if isinstance(first, MetierError):
            raise first from first.__cause__
        raise first from group
