"""Runs over HTTP: start, list, look at, watch, cancel and resume; and the state that the page draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query
from starlette.responses import JSONResponse, Response

from ...agents.errors import ResumeError
from ..events import Event
from ..report.shown_run import shown_run
from ..runs.session import Session
from ..store.records import OpenQuestion, RunRecord
from .admission import Admission
from .announced_errors import errors
from .error_replies import RequestRefused
from .event_hub import RUN_ENDS, EventHub
from .live_runs import LiveRuns
from .run_protocol import NewRun, ResumeAnswers, graph_tree, run_row, run_steps, workflow_of
from .served_models import ServedModels, ServedWorkflow
from .typed_inputs import workflow_input
from .watched_response import EventStream, Write, sse

__all__ = ["RunEndpoints", "add_run_endpoints"]

MAX_LISTED = 1000
QUESTIONS_SHOWN = 50
"""Questions to people that the page's state holds."""
MAX_EVENT = 2**63 - 1

After = Annotated[int | None, Query(ge=0, le=MAX_EVENT, description="Number of the last event that was seen.")]
LastEventId = Annotated[str | None, Header(description="The same, as browsers send it.")]


def add_run_endpoints(api: FastAPI, runs: RunEndpoints) -> None:
    """Add the endpoints under /v1/runs, /v1/events and /v1/state."""
    seen, changed = errors(400, 401, 403, 404), errors(400, 401, 403, 404, 409, 413, 422, 429, 503)
    api.post("/v1/runs", status_code=201, responses=changed)(runs.start)
    api.get("/v1/runs", responses=seen)(runs.list)
    api.get("/v1/runs/{run_id}", responses=seen)(runs.get)
    api.post("/v1/runs/{run_id}/cancel", responses=changed)(runs.cancel)
    api.post("/v1/runs/{run_id}/resume", status_code=202, responses=changed)(runs.resume)
    api.get("/v1/runs/{run_id}/events", responses=seen | errors(429), response_class=Response)(runs.watch_one)
    api.get("/v1/events", responses=seen | errors(429), response_class=Response)(runs.watch_all)
    api.get("/v1/state", responses=seen)(runs.state)


class RunEndpoints:
    """What the endpoints of runs do. `run_options` is kept with a run, so that `metier resume` can go on with it."""

    def __init__(
        self,
        session: Session,
        models: ServedModels,
        runs: LiveRuns,
        hub: EventHub,
        admission: Admission,
        run_options: Callable[[ServedWorkflow], dict[str, Any]],
    ) -> None:
        self._session = session
        self._store = session.store
        self._models = models
        self._runs = runs
        self._hub = hub
        self._admission = admission
        self._run_options = run_options

    async def start(self, new: NewRun) -> JSONResponse:
        """Start a run of a workflow; it goes on whether or not anybody watches."""
        served = self._models.workflow(new.workflow)
        value = workflow_input(served.graph, new.input, self._session.settings.server.json_depth, param="input")
        self._admission.check()
        options = self._run_options(served)
        run_id = self._session.prepare(served.graph, value, seed=new.seed, label="served", options=options)
        self._runs.start(served, run_id, limits=new.limits())
        return JSONResponse(self._shown(run_id), 201)

    async def list(self, limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 50) -> dict[str, Any]:
        """The newest runs of the store, also those of earlier servers and of the command line."""
        rows = self._store.query("SELECT id FROM runs ORDER BY rowid DESC LIMIT ?", limit)
        return {"object": "list", "data": [self._shown(row["id"]) for row in rows]}

    async def get(self, run_id: str, texts: bool = False) -> dict[str, Any]:
        """One run, with its steps and the questions it waits with; `texts` adds what was asked and answered."""
        shown = self._shown(run_id) | run_steps(self._store, run_id)
        if not texts:
            return shown
        settings = self._session.settings.report
        if not settings.texts:
            raise RequestRefused(
                "this server shows no prompts and answers", status=403, code="texts_off", remedy="Set report.texts."
            )
        return shown | {"shown": shown_run(self._store, run_id, settings).data()}

    async def cancel(self, run_id: str) -> dict[str, Any]:
        """Stop a run that goes on here; what is recorded is kept, and it may be resumed."""
        run = self._find(run_id)
        if not self._runs.cancel(run_id):
            raise RequestRefused(
                f"run {run_id} does not go on here: it is {run.state}", status=409, code="run_not_running"
            )
        return {"id": run_id, "cancelled": True}

    async def resume(self, run_id: str, given: ResumeAnswers | None = None) -> JSONResponse:
        """Go on with a run that was cancelled, failed, was killed, or waits for answers; nothing done runs again."""
        run = self._find(run_id)
        served = self._models.workflow(self._store.batch(run.batch).graph)
        if run_id not in self._runs:  # a misfit, and a run that another process has, is said to who sent it
            self._session.take_answers(served.graph, run_id, {} if given is None else given.answers)
        self._runs.start(served, run_id)
        return JSONResponse(self._shown(run_id), 202)

    async def watch_one(
        self, run_id: str, after: After = None, text: bool = False, last_event_id: LastEventId = None
    ) -> Response:
        """A run's events as they happen, the run itself first and last; `text` adds text as it is generated."""
        self._find(run_id)
        after = _after(after, last_event_id)

        async def produce(write: Write) -> None:
            async with self._hub.watch(run_id, after=after, text=text) as events:
                goes_on = run_id in self._runs
                await write(sse(self._shown(run_id), event="run"))
                if not goes_on:
                    while events.statistics().current_buffer_used:
                        await write(_event(*events.receive_nowait()))
                    return
                async for number, event in events:
                    await write(_event(number, event))
                    if event.kind in RUN_ENDS:
                        await write(sse(self._shown(run_id), event="run"))
                        return

        return EventStream(produce, self._session.settings.server)

    async def watch_all(self, after: After = None, last_event_id: LastEventId = None) -> Response:
        """The events of all runs and engines as they happen."""

        async def produce(write: Write) -> None:
            async with self._hub.watch(after=_after(after, last_event_id)) as events:
                await write(b": watching\n\n")
                async for number, event in events:
                    await write(_event(number, event))

        return EventStream(produce, self._session.settings.server)

    async def state(self) -> dict[str, Any]:
        """What the page draws: workflows, counters per role, adapters in slots, the queue, the last decisions."""
        hub, queue = self._hub, self._admission
        return {
            "workflows": [graph_tree(served.graph) for served in self._models.workflows.values()],
            "roles": hub.roles,
            "slots": hub.slots,
            "running": {run_id: steps for run_id, steps in hub.running.items() if run_id in self._runs},
            "queue": {"inside": queue.inside, "waiting": queue.waiting, "refused": queue.refused},
            "decisions": [*hub.decisions],
            "questions": [asdict(one) for one in self._open_questions()],
            "texts": self._session.settings.report.texts,
            "last": hub.last,
            "stopping": queue.closed,
        }

    def _open_questions(self) -> tuple[OpenQuestion, ...]:
        """The oldest questions of runs that can be resumed here."""
        served = self._models.workflows
        own = (one for one in self._store.open_questions() if workflow_of(one.batch) in served)
        return tuple(islice(own, QUESTIONS_SHOWN))

    def _find(self, run_id: str) -> RunRecord:
        try:
            return self._store.run(run_id)
        except ResumeError as error:
            raise RequestRefused(f"no run {run_id[:100]!r}", status=404, code="run_not_found") from error

    def _shown(self, run_id: str) -> dict[str, Any]:
        run = self._find(run_id)
        return run_row(run, live=run.id in self._runs)


def _event(number: int, event: Event) -> bytes:
    return sse(event.model_dump(mode="json"), event=event.kind, id=None if event.kind == "text" else number)


def _after(after: int | None, last_event_id: str | None) -> int | None:
    if after is None and last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit():
        return min(int(last_event_id[:19]), MAX_EVENT)
    return after
