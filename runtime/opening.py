"""Open a session: settings, base model, shelf, engines and store, each entered once and closed in reverse."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..agents.backend import Backend
from ..agents.errors import SettingsError
from ..agents.graphs.graph import TaskGraph
from ..agents.graphs.nodes import BuiltGraph
from ..router.assignment import Assignment, load_assignment
from ..router.route import Router
from ..specializers.shelf.bundled_model import DEFAULT_BASE
from ..specializers.shelf.shelf import Shelf
from .backends import DEFAULT_ENGINE, BackendRequest, OpenBackend, check_engine, open_backend
from .console import on_terminal, say
from .events import STARTUP, Event, Listeners, OnEvent, in_words
from .notebook import NotebookProgress, in_notebook
from .runs.session import Session
from .runs.session_opening import opened_either_way
from .runs.tracing import open_tracer
from .settings.limits import RunLimits
from .settings.session import Settings, load_settings
from .store.store import RunStore
from .tools.calling import ToolCaller

__all__ = ["open_session", "run"]

ENGINE_EVENTS = (
    "adapter_loaded", "adapter_evicted", "engine_ready", "engine_restarted", "server_lost", "server_back",
)  # fmt: skip


@opened_either_way
async def open_session(
    *,
    base: str | Path = DEFAULT_BASE,
    assignment: Assignment | str | Path | None = None,
    backend: Backend | None = None,
    engine: str = DEFAULT_ENGINE,
    shelf: Iterable[str | Path] = (),
    store: RunStore | str | Path | None = None,
    settings: Settings | None = None,
    on_event: OnEvent | None = None,
    variants: Iterable[str] = (),
    other_roles: Iterable[str] = (),
    scripted: Callable[[], Backend] | None = None,
) -> AsyncGenerator[Session]:
    """Open everything a workflow needs; all of it is closed at the end.

    `async with open_session(…) as session` gives a Session. In code that is not `async`, scripts and notebooks among
    it, `with open_session(…) as session` gives a SyncSession, whose methods wait.

    `base` is `smollm2-135m`, a folder or a Hugging Face id; without an `assignment` every role plays on it.
    `shelf` are folders of variants beside the user's own shelf. `engine` is `embedded` (in this process: ready in
    seconds, asyncio or trio), `supervised` (processes of its own, restarted when they die), or the URL of a server,
    `http://…`: `metier serve`, or vLLM's own, whose first model is then the base. Several URLs with commas between
    them are a `Fleet`, and so is `fleet`: the servers of the settings. `ray` is replicas on Ray Serve, as
    `settings.ray` says (asyncio only). `scripted` is the backend that the function of that name makes. A `backend` of
    your own replaces base, shelf and engines. `store` is the file of runs.

    Engines start at the first run that asks a role, or with `session.start_engines()`; what can be checked before is
    checked here. `on_event` is called with what is waited for (`preparing`, `engine_starting`, `engine_ready`) and with
    what runs do; without it, what is waited for is said on a terminal, and a notebook shows it and what runs below
    the cell.

    `variants` names variants that will be asked for beside the assignment's; `other_roles` names roles of later
    workflows, which the assignment may name too.

    Raises: BaseModelError, UnknownVariantError, AdapterError, AssignmentError, SessionError, SettingsError, StoreError.

    >>> from pydantic import BaseModel
    >>> from metier.agents import Role, ScriptedBackend, TaskGraph
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> graph = TaskGraph("solve", takes=Puzzle, gives=str)
    >>> solve = graph.step(Role("solver", takes=Puzzle, gives=str))
    >>> with open_session(backend=ScriptedBackend({"solver": ["4"]}), store=":memory:") as session:
    ...     session.run(graph, Puzzle(text="2 + 2"))
    '4'
    >>> import anyio
    >>> async def main():
    ...     async with open_session(backend=ScriptedBackend({"solver": ["4"]}), store=":memory:") as session:
    ...         return await session.run(graph, Puzzle(text="2 + 2"))
    >>> anyio.run(main)
    '4'
    """
    settings = load_settings() if settings is None else settings
    if not isinstance(settings, Settings):
        raise SettingsError(
            f"settings are {type(settings).__name__}",
            expected="Settings",
            remedy="Write settings=load_settings(None, {'concurrency': 8}), or the path of a file first.",
        )
    check_engine(engine)
    if not isinstance(assignment, Assignment | None):
        assignment = load_assignment(assignment)
    router = Router(assignment)
    variants, shelf = list(variants), list(shelf)
    async with AsyncExitStack() as stack:
        if not isinstance(store, RunStore):
            store = stack.enter_context(RunStore(store if store is not None else settings.store))
        session: Session | None = None
        listeners = Listeners([on_event] if on_event is not None else [])
        if on_event is None and in_notebook():
            listeners.append(NotebookProgress().on_event)
        elif on_event is None and on_terminal():  # where nobody listens, no event is put together
            listeners.append(_tell_on_terminal)

        def note(event: Event) -> None:
            if event.kind in ENGINE_EVENTS and session is not None and session.batch is not None:
                store.record_engine_event(session.batch, event.kind, event.data)
            listeners(event)

        if backend is None:
            request = BackendRequest(
                Shelf(settings.shelf, also=[Path(folder) for folder in shelf]),
                settings,
                base,
                names=(*router.assignment.names(), *variants),
                ready=tuple(dict.fromkeys([*router.assignment.expected_names(), *variants])),
                scripted=scripted,
                on_event=note,
                on_abandoned=store.record_abandoned,
            )
            opened = await stack.enter_async_context(open_backend(engine, request))
        else:
            opened = OpenBackend(backend, settings.engine)
        tools = await stack.enter_async_context(ToolCaller(settings.tools))
        session = Session(
            opened.backend, router, store, settings, listeners, opened.totals, other_roles, opened.base, tools,
            opened_with=_opened_with(base, backend, engine, shelf, settings), start=opened.start,
        )  # fmt: skip
        if settings.tracing:
            session.listen(stack.enter_context(open_tracer(store if settings.tracing_texts else None)).on_event)
        yield session


def run(
    graph: TaskGraph | BuiltGraph,
    value: BaseModel,
    *,
    seed: int = 0,
    limits: RunLimits | None = None,
    label: str = "",
    base: str | Path = DEFAULT_BASE,
    assignment: Assignment | str | Path | None = None,
    backend: Backend | None = None,
    engine: str = DEFAULT_ENGINE,
    shelf: Iterable[str | Path] = (),
    store: RunStore | str | Path | None = None,
    settings: Settings | None = None,
    on_event: OnEvent | None = None,
) -> Any:
    """Run a workflow on one input and return its output: a session is opened for it, and closed.

    For more than one input open a session yourself, since engines take seconds to start. What it is given is as for
    `open_session` and `Session.run`, which say also what they raise.

    >>> from pydantic import BaseModel
    >>> from metier.agents import Role, ScriptedBackend, TaskGraph
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> graph = TaskGraph("solve", takes=Puzzle, gives=str)
    >>> solve = graph.step(Role("solver", takes=Puzzle, gives=str))
    >>> run(graph, Puzzle(text="2 + 2"), backend=ScriptedBackend({"solver": ["4"]}), store=":memory:")
    '4'
    """
    if isinstance(graph, TaskGraph):
        graph.build()  # what is wrong with it is said before all else
    opening = open_session(
        base=base,
        assignment=assignment,
        backend=backend,
        engine=engine,
        shelf=shelf,
        store=store,
        settings=settings,
        on_event=on_event,
    )
    with opening as session:
        return session.run(graph, value, seed=seed, limits=limits, label=label)


def _tell_on_terminal(event: Event) -> None:
    if event.kind in STARTUP:
        say(in_words(event), style="dim")


def _opened_with(
    base: str | Path, backend: Backend | None, engine: str, shelf: Iterable[str | Path], settings: Settings
) -> dict[str, Any]:
    """What is kept with a batch, so that `metier resume` opens the same; of a backend of one's own its class."""
    if backend is not None:
        return {"backend": type(backend).__name__}
    return {
        "base": str(Path(base).resolve()) if Path(base).is_dir() else str(base),
        "engine": engine,
        "shelf": [str(Path(folder).resolve()) for folder in shelf],
        "overrides": settings.model_dump(mode="json", exclude_defaults=True),
    }
