"""Session: runs workflows, many at a time, on one backend with one assignment, and records all of it."""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import anyio
from pydantic import BaseModel, TypeAdapter

from ...agents.backend import Backend, ForeseeingBackend, OnText
from ...agents.errors import LimitError, MetierError, ResumeError, RunInterrupted, first_error
from ...agents.graph import TaskGraph
from ...agents.messages import Ask, Reply
from ...agents.nodes import BuiltGraph
from ...agents.prompts import task_text
from ...agents.tasksets import Task, TaskSet
from ...router.assignment import Assignment
from ...router.route import Router
from ..events import Event, OnEvent
from ..meters.energy import EnergyMeter
from ..report import render_report
from ..settings.limits import RunLimits
from ..settings.session import Settings
from ..store.records import RunRecord
from ..store.store import RunStore
from .batches import check_resumable, keep_answers, new_batch, waiting_for_person
from .executor import Executor
from .foresight import Foresight, RunForesight
from .run_priority import AttainedService, RemainingPath, RunPriority
from .steps import BLOCKED, StepRunner

__all__ = ["RunResult", "Session"]

STREAM_TEXT_EVENTS = 10_000
"""Pieces of text a slow reader of `Session.stream` may fall behind; further ones are dropped, other events never."""

BATCHES_REMEMBERED = 10_000
"""Batches that `Session.report` knows by itself; a server that runs for weeks must not grow."""

GRAPHS_FORESEEN = 64
"""Graphs whose futures are kept worked out; a program that builds a new graph for every run must not grow."""


@dataclass(frozen=True)
class RunResult:
    """How one run of a batch ended; `error` says why when there is no output."""

    run_id: str
    output: Any = None
    error: MetierError | None = None
    score: float | None = None


class Session:
    """Runs workflows on one backend, with one assignment and one store; made by `open_session`.

    >>> import anyio
    >>> from pydantic import BaseModel
    >>> from metier.agents import Role, ScriptedBackend, TaskGraph
    >>> from metier.runtime import open_session
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> graph = TaskGraph("solve", takes=Puzzle, gives=str)
    >>> solve = graph.step(Role("solver", takes=Puzzle, gives=str))
    >>> async def main():
    ...     async with open_session(backend=ScriptedBackend(default=lambda ask: "4"), store=":memory:") as session:
    ...         results = await session.map(graph, [Puzzle(text="2 + 2"), Puzzle(text="1 + 3")], concurrency=2)
    ...         return [result.output for result in results], "solver" in session.report()
    >>> anyio.run(main)
    (['4', '4'], True)
    """

    def __init__(
        self,
        backend: Backend,
        router: Router,
        store: RunStore,
        settings: Settings,
        on_event: OnEvent | None = None,
        totals: Callable[[], dict[str, dict[str, Any]]] | None = None,
        other_roles: Iterable[str] = (),
        base: str = "",
    ) -> None:
        self._backend = backend
        self._router = router
        self.store = store
        self.settings = settings
        self._listeners: list[OnEvent] = [on_event] if on_event else []
        self._totals = totals
        self.base = base
        """Fingerprint of the base model that engines of this session stand on, "" where that is not known."""
        self._id = uuid.uuid4().hex[:6]
        self._batches: deque[str] = deque(maxlen=BATCHES_REMEMBERED)
        self._energy: dict[str, EnergyMeter] = {}
        self._other_roles = frozenset(other_roles)
        # A backend that has these two hears who runs next (see ForeseeingBackend).
        self._foresees = settings.engine.foresight and hasattr(backend, "foresee") and hasattr(backend, "forget")
        self._foresights: dict[int, tuple[BuiltGraph, Foresight]] = {}
        self._paths: dict[int, tuple[BuiltGraph, RemainingPath]] = {}
        self._service = AttainedService()
        self._opened_s = time.monotonic()

    @property
    def batch(self) -> str | None:
        """Id of the batch that was started or resumed last."""
        return self._batches[-1] if self._batches else None

    @property
    def assignment(self) -> Assignment:
        """Which variant plays which role."""
        return self._router.assignment

    def engine_totals(self) -> dict[str, dict[str, Any]]:
        """Engine name → its own counters (see `EnginePool.totals`); empty for other backends."""
        return {} if self._totals is None else self._totals()

    # --- running ------------------------------------------------------------------------------------------

    async def run(
        self,
        graph: TaskGraph | BuiltGraph,
        value: BaseModel,
        *,
        seed: int = 0,
        limits: RunLimits | None = None,
        label: str = "",
    ) -> Any:
        """Run a workflow on one input and return its output.

        Raises: RunError, EngineError or StoreError when it fails; RunInterrupted when it waits for a person.
        """
        built = _built(graph)
        (run,) = self._add_batch(built, [Task("0", value)], seed, label, {})
        result = await self._run_one(built, run, value, limits)
        self._record_totals(run.batch)
        if result.error is not None:
            raise result.error
        return result.output

    async def map(
        self,
        graph: TaskGraph | BuiltGraph,
        inputs: TaskSet | Sequence[BaseModel],
        *,
        concurrency: int | None = None,
        seed: int = 0,
        limits: RunLimits | None = None,
        label: str = "",
        options: dict[str, Any] | None = None,
    ) -> list[RunResult]:
        """Run a workflow on many inputs, `concurrency` at a time; results come in the order of the inputs.

        A run that fails leaves its error in its result; the others go on. With a TaskSet, outputs are scored.
        `options` is kept with the batch for `metier resume`.
        """
        built = _built(graph)
        tasks = list(inputs) if isinstance(inputs, TaskSet) else [Task(str(i), v) for i, v in enumerate(inputs)]
        runs = self._add_batch(built, tasks, seed, label, options or {})
        return await self._run_many(built, tasks, runs, _task_set(inputs), concurrency, limits)

    def route(self, ask: Ask) -> tuple[Ask, str]:
        """The ask with the variant and the thinking that its role and round are assigned, and the reason."""
        route = self._router.route(ask)
        return route.send(ask), route.reason

    async def ask(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """Ask once, outside any run, the variant that the ask names. Nothing is recorded in the store.

        Raises: what the backend raises (see `Backend.reply`).
        """
        return await self._backend.reply(ask, on_text=on_text)

    def prepare(
        self,
        graph: TaskGraph | BuiltGraph,
        value: BaseModel,
        *,
        seed: int = 0,
        label: str = "",
        options: dict[str, Any] | None = None,
    ) -> str:
        """Record a run without starting it, and return its id: `resume` starts it, now or after a crash."""
        (run,) = self._add_batch(_built(graph), [Task("0", value)], seed, label, options or {})
        return run.id

    async def resume(
        self,
        graph: TaskGraph | BuiltGraph,
        run_id: str,
        *,
        answers: dict[str, Any] | None = None,
        limits: RunLimits | None = None,
        stream: bool = False,
    ) -> Any:
        """Go on with a run that was killed, stopped, failed or waits for a person; recorded steps are not repeated.

        `answers` maps a waiting step's path to its answer (an object of the asked type, or JSON data). With `stream`
        its events carry text as it is generated.
        Raises: ResumeError when the run is finished, is another workflow's, or an answer does not fit.
        """
        built = _built(graph)
        run = self.store.run(run_id)
        check_resumable(self.store, built, run)
        keep_answers(self.store, built, run, answers or {})
        value = built.takes.model_validate_json(run.input)
        self._begin(run.batch)
        result = await self._run_one(built, run, value, limits, resumed=True, stream=stream)
        self._record_totals(run.batch)
        if result.error is not None:
            raise result.error
        return result.output

    async def resume_batch(
        self,
        graph: TaskGraph | BuiltGraph,
        batch: str,
        inputs: TaskSet | None = None,
        *,
        concurrency: int | None = None,
        limits: RunLimits | None = None,
    ) -> list[RunResult]:
        """Go on with every run of a batch that is not finished, also those that never started."""
        built = _built(graph)
        open_runs = [run for run in self.store.runs(batch) if run.state != "finished"]
        for run in open_runs:
            check_resumable(self.store, built, run)
        tasks = [Task(run.task or "", built.takes.model_validate_json(run.input)) for run in open_runs]
        if inputs is not None:
            by_id = {task.id: task for task in inputs}
            tasks = [by_id.get(task.id, task) for task in tasks]
        self._begin(batch)
        return await self._run_many(built, tasks, open_runs, inputs, concurrency, limits, resumed=True)

    @asynccontextmanager
    async def stream(
        self, graph: TaskGraph | BuiltGraph, value: BaseModel, *, seed: int = 0, limits: RunLimits | None = None
    ) -> AsyncGenerator[AsyncIterator[Event]]:
        """Run a workflow and watch it: `async with session.stream(graph, x) as events: async for event in events`.

        Events carry text as it is generated (`text`) and end with `run_finished`, `run_failed` or
        `run_interrupted`. Leaving the block early cancels the run.
        """
        built = _built(graph)
        (run,) = self._add_batch(built, [Task("0", value)], seed, "", {})
        sender, receiver = anyio.create_memory_object_stream[Event](math.inf)

        def listen(event: Event) -> None:
            behind = sender.statistics().current_buffer_used >= STREAM_TEXT_EVENTS
            if event.run_id == run.id and not (behind and event.kind == "text"):
                sender.send_nowait(event)

        async def work() -> None:
            async with sender:
                await self._run_one(built, run, value, limits, stream=True)
            self._record_totals(run.batch)

        self._listeners.append(listen)
        try:
            async with receiver, anyio.create_task_group() as tasks:
                tasks.start_soon(work)
                yield receiver
                tasks.cancel_scope.cancel()
        finally:
            self._listeners.remove(listen)

    def report(self, batches: Iterable[str] | None = None) -> str:
        """Markdown report of this session's batches, or of the ones named."""
        return render_report(self.store, list(batches or dict.fromkeys(self._batches)))

    # --- inside -------------------------------------------------------------------------------------------

    async def _run_many(
        self,
        built: BuiltGraph,
        tasks: list[Task],
        runs: list[RunRecord],
        task_set: TaskSet | None,
        concurrency: int | None,
        limits: RunLimits | None,
        resumed: bool = False,
    ) -> list[RunResult]:
        results: list[RunResult | None] = [None] * len(tasks)
        queue = deque(range(len(tasks)))

        async def worker() -> None:
            while queue:
                index = queue.popleft()
                task, run = tasks[index], runs[index]
                score = None if task_set is None else partial(task_set.score, task)
                results[index] = await self._run_one(
                    built, run, task.input, limits, score=score, resumed=resumed, again=lambda: bool(queue)
                )

        async with anyio.create_task_group() as workers:
            for _ in range(min(concurrency or self.settings.concurrency, len(tasks))):
                workers.start_soon(worker)
        if runs:
            self._record_totals(runs[0].batch)
        return [result for result in results if result is not None]

    async def _run_one(
        self,
        built: BuiltGraph,
        run: RunRecord,
        value: BaseModel,
        limits: RunLimits | None,
        *,
        score: Callable[[Any], float] | None = None,
        resumed: bool = False,
        stream: bool = False,
        again: Callable[[], bool] = lambda: False,
    ) -> RunResult:
        """One run that nobody else is at; one that another driver has finished meanwhile is read back."""
        with ExitStack() as claims:
            try:
                claims.enter_context(self.store.claim(run.id))
            except ResumeError as error:
                return RunResult(run.id, error=error)
            now = self.store.run(run.id) if resumed else run
            if now.state == "finished":
                output = TypeAdapter(built.gives).validate_json(now.output or "null")
                return RunResult(run.id, output, score=now.score)
            return await self._run_claimed(
                built, run, value, limits, score=score, resumed=resumed, stream=stream, again=again
            )

    async def _run_claimed(
        self,
        built: BuiltGraph,
        run: RunRecord,
        value: BaseModel,
        limits: RunLimits | None,
        *,
        score: Callable[[Any], float] | None,
        resumed: bool,
        stream: bool,
        again: Callable[[], bool],
    ) -> RunResult:
        """One run from start to its end in the store; errors on purpose end the run, not the batch.

        `again` says whether another run of the graph will follow this one. The score is recorded with the end: a
        run killed between the two would be finished and never scored.
        """
        run_id = run.id
        limits = limits or self.settings.limits
        began = time.monotonic()
        self.store.start_run(run_id)
        on_event = self.emit if self._listeners else None
        steps = StepRunner(
            run_id,
            self.store,
            self._router.route,
            self._backend,
            on_event=on_event,
            limits=limits,
            seed=run.seed,
            task=task_text(value),
            stream=stream,
            resumed=resumed,
            priority=self._priority(built, began - self._opened_s),
            remaining=self._remaining(built),
        )
        self.emit(Event(kind="run_started", run_id=run_id, data={"resumed": resumed}))
        try:
            with anyio.move_on_after(limits.max_seconds_s or math.inf) as scope:
                output = await _unwrapped(Executor(steps, self._foresight(built, run_id, again)).run(built, value))
            if scope.cancelled_caught:
                raise LimitError(
                    f"run {run_id} took longer than max_seconds_s={limits.max_seconds_s}",
                    expected="the run to end within its limit",
                    remedy="Raise the limit and resume the run: what was recorded is kept.",
                )
            if output is BLOCKED:
                raise waiting_for_person(self.store, run_id)
        except MetierError as error:
            return self._end_badly(run_id, error, score, time.monotonic() - began)
        text = TypeAdapter(built.gives).dump_json(output).decode()
        scored = None if score is None else score(output)
        self.store.end_run(run_id, "finished", output=text, score=scored, busy_s=time.monotonic() - began)
        self.emit(Event(kind="run_finished", run_id=run_id, data={"output": text}))
        return self._scored(RunResult(run_id, output, score=scored))

    def _end_badly(
        self, run_id: str, error: MetierError, score: Callable[[Any], float] | None, busy_s: float
    ) -> RunResult:
        if isinstance(error, RunInterrupted):
            self.store.end_run(run_id, "interrupted", busy_s=busy_s)
            self.emit(Event(kind="run_interrupted", run_id=run_id, data={"questions": error.questions}))
            return RunResult(run_id, error=error)
        state: Literal["stopped", "failed"] = "stopped" if isinstance(error, LimitError) else "failed"
        scored = None if score is None else score(None)
        self.store.end_run(run_id, state, error=str(error), score=scored, busy_s=busy_s)
        self.emit(Event(kind="run_failed", run_id=run_id, data={"error": str(error)}))
        return self._scored(RunResult(run_id, error=error, score=scored))

    def _scored(self, result: RunResult) -> RunResult:
        if result.score is not None:
            self.emit(Event(kind="run_scored", run_id=result.run_id, data={"score": result.score}))
        return result

    def _foresight(self, built: BuiltGraph, run_id: str, again: Callable[[], bool]) -> RunForesight | None:
        if not self._foresees:
            return None
        if id(built) not in self._foresights:
            if len(self._foresights) >= GRAPHS_FORESEEN:
                self._foresights.clear()
            foresight = Foresight(built, self._variant_of, asks=self.settings.engine.foresight_asks)
            self._foresights[id(built)] = (built, foresight)
        return RunForesight(run_id, self._foresights[id(built)][1], cast(ForeseeingBackend, self._backend), again=again)

    def _priority(self, built: BuiltGraph, began_s: float) -> RunPriority | None:
        settings = self.settings.priority
        if settings.order == "first_come":
            return None
        return RunPriority(self._remaining(built), settings, self._service, began_s=began_s)

    def _remaining(self, built: BuiltGraph) -> RemainingPath:
        if id(built) not in self._paths:
            if len(self._paths) >= GRAPHS_FORESEEN:
                self._paths.clear()
            self._paths[id(built)] = (built, RemainingPath(built, self._seconds_of))
        return self._paths[id(built)][1]

    def _seconds_of(self, role: str) -> float:
        assigned = self._router.assignment.roles.get(role)
        expected_s = None if assigned is None else assigned.expected_s
        return self.settings.priority.ask_s if expected_s is None else expected_s

    def _variant_of(self, role: str, round_number: int) -> str | None:
        return self._router.expect(role, round_number).variant

    def listen(self, on_event: OnEvent) -> None:
        """Hear of everything that happens from now on."""
        self._listeners.append(on_event)

    def emit(self, event: Event) -> None:
        """Hand an event to everyone who listens."""
        for listen in self._listeners:
            listen(event)

    def _add_batch(
        self, built: BuiltGraph, tasks: list[Task], seed: int, label: str, options: dict[str, Any]
    ) -> list[RunRecord]:
        assignment = self._router.assignment
        assignment.check_roles({*built.roles(), *self._other_roles})
        options = {"assignment": assignment.model_dump(mode="json", exclude_defaults=True), **options}
        batch, runs = new_batch(built, tasks, seed, label, options)
        self.store.add_batch(batch, runs)
        self._begin(batch.id)
        return runs

    def _begin(self, batch: str) -> None:
        self._batches.append(batch)
        self._energy[batch] = EnergyMeter()
        self._energy[batch].start()

    def _record_totals(self, batch: str) -> None:
        energy = self._energy.pop(batch).take() if batch in self._energy else None
        if energy is not None:
            self.store.record_energy(batch, energy)
        if self._totals is not None:
            for engine, totals in self._totals().items():
                self.store.record_engine_totals(batch, f"{engine}@{self._id}", totals)


async def _unwrapped(work: Awaitable[Any]) -> Any:
    """Await, and raise the first error itself rather than the group that task groups wrap it in."""
    try:
        return await work
    except BaseExceptionGroup as group:
        first = first_error(group)
        if isinstance(first, MetierError):
            raise first from first.__cause__
        raise first from group


def _built(graph: TaskGraph | BuiltGraph) -> BuiltGraph:
    return graph.build() if isinstance(graph, TaskGraph) else graph


def _task_set(inputs: TaskSet | Sequence[BaseModel]) -> TaskSet | None:
    return inputs if isinstance(inputs, TaskSet) else None
