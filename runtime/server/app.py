"""The FastAPI application: chat completions, models, runs, health and figures, around one session."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ...agents.errors import MetierError
from ..runs.session import Session
from .admission import Admission
from .announced_errors import errors
from .chat.chat import Chat
from .chat.chat_endpoints import add_chat_endpoints
from .chat.responses_endpoint import add_responses_endpoint
from .chat.stored_responses import StoredResponses
from .error_replies import RequestRefused, error_response, refuse_validation
from .event_hub import EventHub
from .live_runs import LiveRuns
from .metrics import ServerMetrics
from .request_checks import RequestChecks
from .run_endpoints import RunEndpoints, add_run_endpoints
from .served_models import ServedModels, ServedWorkflow
from .unserved_endpoints import add_unserved_endpoints

__all__ = ["MetierApp", "make_app"]


PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
"""The page is one file and talks to its own server only."""


class MetierApp:
    """An ASGI application, and the parts of it that must be stopped with the server."""

    def __init__(self, inner: ASGIApp, api: FastAPI, admission: Admission, hub: EventHub, runs: LiveRuns) -> None:
        self._inner = inner
        self.api = api
        self.admission = admission
        self.hub = hub
        self.runs = runs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._inner(scope, receive, send)

    def drain(self) -> None:
        """Refuse all further requests, and end the streams of clients that only watch."""
        self.admission.close()
        self.hub.close()


def make_app(
    session: Session,
    workflows: Sequence[ServedWorkflow],
    *,
    variants: Iterable[str | None] = (),
    key: str | None = None,
    run_options: Callable[[ServedWorkflow], dict[str, Any]] = lambda served: {},
) -> MetierApp:
    """The application over an open session; `variants` are served by name beside those of its assignment.

    With a `key` every client has to give it; without one only loopback names are answered.
    """
    settings = session.settings.server
    admission, hub = Admission(settings), EventHub(settings)
    metrics = ServerMetrics(admission, session.engine_totals)
    session.listen(hub.on_event)
    session.listen(metrics.on_event)
    models = ServedModels(workflows, [*session.assignment.names(), *variants])
    runs = LiveRuns(session, admission)
    chat = Chat(session, models, runs, settings, run_options)

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as runs.tasks:
            yield
            admission.close()
            hub.close()
            with anyio.move_on_after(settings.drain_s):
                await runs.wait_idle()
            runs.tasks.cancel_scope.cancel()

    api = FastAPI(
        title="metier",
        description="Workflows, roles and variants of one model, behind OpenAI's protocol.",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    add_chat_endpoints(api, chat, models, admission, settings, session.base)
    add_responses_endpoint(api, chat, StoredResponses(session.store, settings, key), admission, settings)
    add_run_endpoints(api, RunEndpoints(session, models, runs, hub, admission, run_options))
    add_unserved_endpoints(api)
    _add_health(api, admission, metrics)
    api.add_exception_handler(MetierError, _answer_error)
    api.add_exception_handler(RequestValidationError, _answer_error)
    api.add_exception_handler(HTTPException, _answer_error)
    return MetierApp(RequestChecks(api, settings, key, metrics.count), api, admission, hub, runs)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        error = refuse_validation(error)
    elif isinstance(error, HTTPException):
        name = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        what = f"{request.method} {request.url.path[:100]}: {error.detail}"
        error = RequestRefused(what, status=error.status_code, code=name, expected="a path of /openapi.json")
    return error_response(error)


def _add_health(api: FastAPI, admission: Admission, metrics: ServerMetrics) -> None:
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        """The live view, whole in one file."""
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @api.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @api.get("/ready", responses={503: {"description": "It is about to stop"}})
    async def ready() -> JSONResponse:
        """Whether it takes requests: 503 once it drains."""
        if admission.closed:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready"})

    @api.get("/metrics", responses=errors(401, 403))
    async def show_metrics() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
