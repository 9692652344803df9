"""Open a session: settings, base model, shelf, engines and store, each entered once and closed in reverse."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from anyio import from_thread, to_thread

from ..agents.backend import Backend
from ..agents.errors import SettingsError
from ..agents.messages import Ask, Usage
from ..router.assignment import Assignment, load_assignment
from ..router.route import Router
from .events import Event, OnEvent
from .session import Session
from .settings import Settings, load_settings
from .store import RunStore

if TYPE_CHECKING:
    from ..specializers.variant import Variant
    from .pool import EnginePool

__all__ = ["EngineForm", "open_session"]

EngineForm = Literal["embedded", "supervised"]
ENGINE_EVENTS = ("adapter_loaded", "adapter_evicted", "engine_ready", "engine_restarted")


@asynccontextmanager
async def open_session(
    *,
    base: str | Path = "smollm2-135m",
    assignment: Assignment | str | Path | None = None,
    backend: Backend | None = None,
    engine: EngineForm = "embedded",
    variants: Iterable[str | Path] = (),
    store: RunStore | str | Path | None = None,
    settings: Settings | None = None,
    on_event: OnEvent | None = None,
) -> AsyncGenerator[Session]:
    """Open everything a workflow needs and yield a Session; all of it is closed at the end.

    `base` is `smollm2-135m`, a folder or a Hugging Face id; without an `assignment` every role plays on it.
    `variants` are folders of variants beside the shelf. `engine` is `embedded` (in this process: ready in
    seconds, asyncio or trio) or `supervised` (processes of its own, restarted when they die). A `backend` of
    your own (ScriptedBackend, a server) replaces base, shelf and engines. `store` is the file of runs.

    Raises: BaseModelError, UnknownVariantError, AdapterError, AssignmentError, SettingsError, StoreError.
    """
    settings = settings or load_settings()
    if engine not in ("embedded", "supervised"):
        raise SettingsError(f"engine={engine!r}", expected="'embedded' or 'supervised'")
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

        if backend is not None:
            session = Session(backend, router, store, settings, on_event)
        else:
            pool = await _open_pool(base, router.assignment, engine, variants, settings, tell, store.record_abandoned)
            await stack.enter_async_context(pool)
            await pool.warm(router.assignment.names())
            session = Session(pool, router, store, settings, on_event, pool.totals)
        yield session


async def _open_pool(
    base: str | Path,
    assignment: Assignment,
    engine: EngineForm,
    variants: Iterable[str | Path],
    settings: Settings,
    on_event: OnEvent,
    on_abandoned: Callable[[Ask, Usage], None],
) -> EnginePool:
    # Imported here: sessions on another backend need none of it.
    from ..specializers.base_model import find_base
    from ..specializers.shelf import Shelf
    from .pool import EnginePool

    shelf = Shelf(settings.shelf, also=[Path(folder) for folder in variants])
    wanted = {name: shelf.get(name) for name in sorted(assignment.variants())}

    def say(what: str) -> None:
        from_thread.run_sync(on_event, Event(kind="preparing", data={"what": what}))

    folder = await to_thread.run_sync(partial(find_base, str(base), progress=say))

    def resolve(name: str) -> tuple[Variant, Path]:
        variant = wanted.get(name) or shelf.get(name)
        return variant, shelf.path(variant)

    return EnginePool(
        folder,
        resolve,
        settings.engine,
        supervised=engine == "supervised",
        adapters={variant.checkpoint for variant in wanted.values() if variant.ask.adapter},
        on_event=on_event,
        on_abandoned=on_abandoned,
    )
