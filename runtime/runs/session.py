"""Session: runs workflows, many at a time, on one backend with one assignment, and records all of it."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel

from ...agents.backend import Backend, OnText
from ...agents.errors import ResumeError
from ...agents.graphs.conversation_graph import conversation_graph
from ...agents.graphs.graph import TaskGraph
from ...agents.graphs.nodes import BuiltGraph
from ...agents.messages import Ask, Reply
from ...agents.roles import Role
from ...agents.tasksets import Task, TaskSet
from ...router.assignment import Assignment
from ...router.route import Router
from ..events import Event, Listeners, OnEvent
from ..report import render_report
from ..report.text import ReportText
from ..settings.limits import RunLimits
from ..settings.session import Settings
from ..store.records import CONVERSATION, RunRecord
from ..store.store import RunStore
from ..tools.calling import ToolCaller
from .batches import built_graph, check_resumable, new_batch, recorded_input, take_answers
from .conversation import Conversation, find_conversation
from .memory import check_memory
from .run_driver import RunDriver
from .run_plan import RunPlan, RunResult, scored_by
from .session_engines import SessionEngines
from .watched_run import watched

__all__ = ["Session"]

BATCHES_REMEMBERED = 10_000
"""Batches that `Session.report` knows by itself; a server that runs for weeks must not grow."""


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
        listeners: Listeners | None = None,
        totals: Callable[[], dict[str, dict[str, Any]]] | None = None,
        other_roles: Iterable[str] = (),
        base: str = "",
        tools: ToolCaller | None = None,
        opened_with: Mapping[str, Any] | None = None,
        start: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._backend = backend
        self._router = router
        self.store = store
        self.settings = settings
        self._listeners = Listeners() if listeners is None else listeners
        self._driver = RunDriver(backend, router, store, settings, self._listeners, tools or ToolCaller(settings.tools))
        self._engines = SessionEngines(store, start, totals)
        self.base = base
        """Fingerprint of the base model of this session's engines, "" where it is not known."""
        self._batches: deque[str] = deque(maxlen=BATCHES_REMEMBERED)
        self._other_roles = frozenset(other_roles)
        self._opened_with = dict(opened_with or {})

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
        return self._engines.totals()

    async def start_engines(self) -> None:
        """Start the engines now: to have them warm, or to measure without it. Otherwise the first run with a role does.

        Raises: EngineError and EngineDeadError when one does not start.
        """
        await self._engines.start()

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

        What `limits` leave open, the settings say, here and in the other methods.
        Raises: RunError, EngineError or StoreError when it fails; RunInterrupted when it waits for a person.
        """
        (run,), (value,) = self._add_batch(graph, [Task("0", value)], seed, label, {})
        return await self._output(RunPlan(built_graph(graph), run, value, self._limits(limits)))

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
        built = built_graph(graph)
        tasks = list(inputs) if isinstance(inputs, TaskSet) else [Task(str(i), v) for i, v in enumerate(inputs)]
        runs, values = self._add_batch(graph, tasks, seed, label, options or {})
        task_set, limits = inputs if isinstance(inputs, TaskSet) else None, self._limits(limits)
        plans = [
            RunPlan(built, run, value, limits, scored_by(task_set, task))
            for run, value, task in zip(runs, values, tasks, strict=True)
        ]
        return await self._results(plans, concurrency)

    def route(self, ask: Ask) -> tuple[Ask, str]:
        """The ask with the variant and the thinking that its role and round are assigned, and the reason."""
        route = self._router.route(ask)
        return route.send(ask), route.reason

    async def ask(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """Ask once, outside any run, the variant that the ask names. Nothing is recorded in the store.

        Raises: what the backend raises (see `Backend.reply`).
        """
        await self._engines.start()
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
        (run,), _ = self._add_batch(graph, [Task("0", value)], seed, label, options or {})
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
        Raises: ResumeError when the run is finished, is another workflow's, is under way in another process, or an
        answer does not fit.
        """
        built = built_graph(graph)
        run = self.take_answers(built, run_id, answers or {})
        value = recorded_input(built, run)
        self._begin(run.batch)
        return await self._output(RunPlan(built, run, value, self._limits(limits), resumed=True, stream=stream))

    def take_answers(self, graph: BuiltGraph, run_id: str, answers: Mapping[str, Any]) -> RunRecord:
        """Check that a run can be resumed here, and keep a person's answers for when it is; returns the run.

        Raises: what `resume` raises before it starts.
        """
        return take_answers(self.store, graph, run_id, answers)

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
        built = built_graph(graph)
        open_runs = [run for run in self.store.runs(batch) if run.state != "finished"]
        for run in open_runs:
            check_resumable(self.store, built, run)
        by_id = {} if inputs is None else {task.id: task for task in inputs}
        self._begin(batch)
        plans, unreadable = [], {}
        for run in open_runs:
            try:
                task = by_id.get(run.task or "") or Task(run.task or "", recorded_input(built, run))
            except ResumeError as error:
                unreadable[run.id] = RunResult(run.id, error=error)
                continue
            score = scored_by(inputs, task)
            plans.append(RunPlan(built, run, task.input, self._limits(limits), score, resumed=True))
        results = {result.run_id: result for result in await self._results(plans, concurrency)} | unreadable
        return [results[run.id] for run in open_runs]

    @asynccontextmanager
    async def stream(
        self,
        graph: TaskGraph | BuiltGraph,
        value: BaseModel,
        *,
        seed: int = 0,
        limits: RunLimits | None = None,
        answers: bool = False,
    ) -> AsyncGenerator[AsyncIterator[Event]]:
        """Run a workflow and watch it: `async with session.stream(graph, x) as events: async for event in events`.

        Events carry text as it is generated (`text`) and end with `run_finished`, `run_failed` or `run_interrupted`.
        With `answers` the answers of roles come as they grow too (`partial_answer`, see `GrowingAnswer`), and whole.
        Leaving the block early cancels the run.
        """
        built = built_graph(graph)
        (run,), (value,) = self._add_batch(built, [Task("0", value)], seed, "", {})
        plan = RunPlan(built, run, value, self._limits(limits), stream=True)
        async with watched(run.id, lambda: self._result(plan), self._listeners, built if answers else None) as events:
            yield events

    @asynccontextmanager
    async def chat(
        self,
        speaker: Role | TaskGraph | BuiltGraph,
        *,
        resume: str | None = None,
        seed: int = 0,
        limits: RunLimits | None = None,
        options: dict[str, Any] | None = None,
    ) -> AsyncGenerator[Conversation]:
        """Talk with a role or a workflow: `async with session.chat(role) as chat: reply = await chat.say("…")`.

        Each turn is a run; `resume` goes on with the conversation of an id. `limits` are those of a turn.
        Raises: GraphError when the workflow's input has no field for turns, ResumeError for an id that is not of it.
        """
        graph, limits = conversation_graph(speaker), self._limits(limits)
        kept = {CONVERSATION: speaker.name if isinstance(speaker, Role) else "", **(options or {})}
        options = self._batch_options(graph if isinstance(speaker, Role) else speaker, kept)
        begins = new_batch(graph, [], seed, "", options)[0]
        batch = begins if resume is None else find_conversation(self.store, graph, resume)

        async def do(graph: BuiltGraph, run: RunRecord, answers: Mapping[str, Any], stream: bool) -> Any:
            if answers:
                run = self.take_answers(graph, run.id, answers)
            self._begin(batch.id)
            begun, value = run.state != "waiting", recorded_input(graph, run)
            return await self._output(RunPlan(graph, run, value, limits, resumed=begun, stream=stream))

        most = self.settings.conversation_tokens
        yield Conversation(speaker, graph, batch, self.store, self._listeners, do, most, seed)

    def report(self, batches: Iterable[str] | None = None) -> ReportText:
        """Report of this session's batches, or of the ones named: Markdown, which a notebook shows as a page."""
        return render_report(self.store, list(batches or dict.fromkeys(self._batches)))

    # --- inside -------------------------------------------------------------------------------------------

    async def _result(self, plan: RunPlan) -> RunResult:
        if plan.graph.roles():
            await self._engines.start()
        result = await self._driver.run(plan)
        self._engines.record(plan.record.batch)
        return result

    async def _output(self, plan: RunPlan) -> Any:
        result = await self._result(plan)
        if result.error is not None:
            raise result.error
        return result.output

    async def _results(self, plans: Sequence[RunPlan], concurrency: int | None) -> list[RunResult]:
        if any(plan.graph.roles() for plan in plans):
            await self._engines.start()
        results = await self._driver.run_many(plans, concurrency or self.settings.concurrency)
        if plans:
            self._engines.record(plans[0].record.batch)
        return results

    def listen(self, on_event: OnEvent) -> None:
        """Call `on_event` with every event from now on."""
        self._listeners.append(on_event)

    def emit(self, event: Event) -> None:
        """Pass an event to all listeners."""
        self._listeners(event)

    def _add_batch(
        self, graph: TaskGraph | BuiltGraph, tasks: list[Task], seed: int, label: str, options: dict[str, Any]
    ) -> tuple[list[RunRecord], list[BaseModel]]:
        batch, runs, values = new_batch(built_graph(graph), tasks, seed, label, self._batch_options(graph, options))
        self.store.add_batch(batch, runs)
        self._begin(batch.id)
        return runs, values

    def _batch_options(self, graph: TaskGraph | BuiltGraph, options: dict[str, Any]) -> dict[str, Any]:
        """What the command line needs to go on with a batch, also with one that Python starts."""
        assignment = self._router.assignment
        assignment.check_roles({*built_graph(graph).roles(), *self._other_roles})
        if self.base:  # of a server's engine the context is not known here: the ask says so
            check_memory(built_graph(graph), self.settings.engine.max_model_tokens)
        known = {"workflow": graph.reference() if isinstance(graph, TaskGraph) else "", **self._opened_with}
        return {**known, "assignment": assignment.model_dump(mode="json", exclude_defaults=True), **options}

    def _limits(self, given: RunLimits | None) -> RunLimits:
        own = self.settings.limits
        return own if given is None else given.over(own)

    def _begin(self, batch: str) -> None:
        self._batches.append(batch)
        self._engines.begin(batch)
