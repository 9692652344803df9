"""Open a session: settings, base model, shelf, engines and store, each entered once and closed in reverse."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from anyio import from_thread, to_thread
from pydantic import Field

from ..agents.backend import Backend
from ..agents.errors import SettingsError
from ..agents.messages import Ask, Usage
from ..router.assignment import Assignment, load_assignment
from ..router.route import Router
from .events import Event, OnEvent
from .runs.session import Session
from .runs.tracing import open_tracer
from .settings.session import API_KEY_VARIABLE, Settings, load_settings
from .store.store import RunStore

if TYPE_CHECKING:
    from ..specializers.shelf.variant import Variant
    from .engines.pool import EnginePool
    from .ray.backend import RayBackend
    from .remote.fleet import Fleet
    from .remote.remote_backend import RemoteBackend, Resolve

__all__ = ["AnyEngine", "EngineForm", "ServerUrl", "open_session"]

EngineForm = Literal["embedded", "supervised"]
FLEET = "fleet"
RAY = "ray"
SERVER_SCHEMES = ("http://", "https://")
ENGINE_EVENTS = (
    "adapter_loaded", "adapter_evicted", "engine_ready", "engine_restarted", "server_lost", "server_back",
)  # fmt: skip


@asynccontextmanager
async def open_session(
    *,
    base: str | Path = "smollm2-135m",
    assignment: Assignment | str | Path | None = None,
    backend: Backend | None = None,
    engine: EngineForm | str = "embedded",
    variants: Iterable[str | Path] = (),
    store: RunStore | str | Path | None = None,
    settings: Settings | None = None,
    on_event: OnEvent | None = None,
    also: Iterable[str] = (),
    other_roles: Iterable[str] = (),
) -> AsyncGenerator[Session]:
    """Open everything a workflow needs and yield a Session; all of it is closed at the end.

    `base` is `smollm2-135m`, a folder or a Hugging Face id; without an `assignment` every role plays on it.
    `variants` are folders of variants beside the shelf. `engine` is `embedded` (in this process: ready in
    seconds, asyncio or trio), `supervised` (processes of its own, restarted when they die), or the URL of a server,
    `http://…`: `metier serve`, or vLLM's own, whose first model is then the base. Several URLs with commas between
    them are a `Fleet`, and so is `fleet`: the servers of the settings. `ray` is replicas on Ray Serve, as
    `settings.ray` says (asyncio only). A `backend` of your own replaces base, shelf and
    engines. `store` is the file of runs.

    `also` names variants that will be asked for beside the assignment's, `other_roles` roles of workflows yet to come
    that the assignment may name.

    Raises: BaseModelError, UnknownVariantError, AdapterError, AssignmentError, SettingsError, StoreError.
    """
    settings = settings or load_settings()
    remote = engine.startswith(SERVER_SCHEMES)
    if engine not in ("embedded", "supervised", FLEET, RAY) and not remote:
        expected = "'embedded', 'supervised', 'fleet', 'ray' or a URL, http://…"
        raise SettingsError(f"engine={engine!r}", expected=expected)
    if not isinstance(assignment, Assignment | None):
        assignment = load_assignment(assignment)
    router = Router(assignment)
    async with AsyncExitStack() as stack:
        if not isinstance(store, RunStore):
            store = stack.enter_context(RunStore(store if store is not None else settings.store))
        session: Session | None = None

        def tell(event: Event) -> None:
            if event.kind in ENGINE_EVENTS and session is not None and session.batch is not None:
                store.record_engine_event(session.batch, event.kind, event.data)
            if session is not None:
                session.emit(event)
            elif on_event is not None:
                on_event(event)

        totals: Callable[[], dict[str, dict[str, Any]]] | None = None
        fingerprint = ""
        names = [*router.assignment.names(), *also]
        if backend is None and (engine == FLEET or "," in engine):
            backend = await stack.enter_async_context(_open_fleet(engine, variants, settings, tell))
            await backend.warm(names)
            totals = backend.totals
        elif backend is None and remote:
            backend = await stack.enter_async_context(_open_remote(engine, variants, settings))
            await backend.warm(names)
        elif backend is None:
            wanted = sorted({name for name in names if name is not None})
            backend, fingerprint = await _open_pool(
                base, wanted, engine, variants, settings, tell, store.record_abandoned
            )
            await stack.enter_async_context(backend)
            await backend.warm(dict.fromkeys([*router.assignment.expected_names(), *also]))
            totals = backend.totals
        session = Session(backend, router, store, settings, on_event, totals, other_roles, fingerprint)
        if settings.tracing:
            session.listen(stack.enter_context(open_tracer()).on_event)
        yield session


def _open_remote(url: str, variants: Iterable[str | Path], settings: Settings) -> RemoteBackend:
    from .remote.remote_backend import RemoteBackend

    return RemoteBackend(url, _on_shelf(variants, settings), settings.remote, api_key=os.environ.get(API_KEY_VARIABLE))


def _open_fleet(engine: str, variants: Iterable[str | Path], settings: Settings, on_event: OnEvent) -> Fleet:
    from .remote.fleet import Fleet

    fleet = settings.fleet
    return Fleet(
        fleet if engine == FLEET else fleet.of(engine.split(",")),
        _on_shelf(variants, settings),
        settings.remote,
        api_key=os.environ.get(API_KEY_VARIABLE),
        on_event=on_event,
    )


def _on_shelf(variants: Iterable[str | Path], settings: Settings) -> Resolve:
    from ..specializers.shelf.shelf import Shelf

    shelf = Shelf(settings.shelf, also=[Path(folder) for folder in variants])

    def resolve(name: str) -> tuple[Variant, Path]:
        variant = shelf.get(name)
        return variant, shelf.path(variant)

    return resolve


async def _open_pool(
    base: str | Path,
    names: list[str],
    engine: str,
    variants: Iterable[str | Path],
    settings: Settings,
    on_event: OnEvent,
    on_abandoned: Callable[[Ask, Usage], None],
) -> tuple[EnginePool | RayBackend, str]:
    # Imported here: sessions on another backend need none of it.
    from ..specializers.shelf.base_model import base_fingerprint, find_base
    from ..specializers.shelf.shelf import Shelf

    shelf = Shelf(settings.shelf, also=[Path(folder) for folder in variants])
    wanted = {name: shelf.get(name) for name in names}

    def say(what: str) -> None:
        from_thread.run_sync(on_event, Event(kind="preparing", data={"what": what}))

    folder = await to_thread.run_sync(partial(find_base, str(base), progress=say))

    def resolve(name: str) -> tuple[Variant, Path]:
        variant = wanted.get(name) or shelf.get(name)
        return variant, shelf.path(variant)

    fingerprint = await to_thread.run_sync(base_fingerprint, folder)
    adapters = {variant.checkpoint for variant in wanted.values() if variant.ask.adapter}
    engines = settings.engine.with_room_for(variant.ask.rank for variant in wanted.values())
    if engine == RAY:
        from .ray.backend import RayBackend

        on_ray = RayBackend(
            folder,
            resolve,
            settings.ray,
            engines,
            adapters=adapters,
            on_event=on_event,
            on_abandoned=on_abandoned,
        )
        return on_ray, fingerprint
    from .engines.pool import EnginePool

    pool = EnginePool(
        folder,
        resolve,
        engines,
        supervised=engine == "supervised",
        adapters=adapters,
        on_event=on_event,
        on_abandoned=on_abandoned,
    )
    return pool, fingerprint


AnyEngine = Literal["embedded", "supervised", "scripted", "fleet", "ray"]


ServerUrl = Annotated[str, Field(pattern=r"^https?://")]
"""One, or several with commas between them."""
