"""Which engine answers asks: the names there are, and how each is opened.

Everything that starts one comes through `open_backend`. An engine of another kind is one function of this file and
one row of `ENGINES`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from anyio import from_thread, to_thread
from pydantic import AfterValidator

from ..agents.backend import Backend
from ..agents.errors import SettingsError, did_you_mean
from ..agents.messages import Ask, Usage
from ..specializers.machine.threads import engine_threads
from ..specializers.shelf.bundled_model import DEFAULT_BASE
from .events import Event, OnEvent
from .settings.engine import EngineSettings
from .settings.session import API_KEY_VARIABLE, Settings

if TYPE_CHECKING:
    from ..specializers.shelf.shelf import Shelf
    from ..specializers.shelf.variant import Variant

__all__ = [
    "DEFAULT_ENGINE",
    "ENGINES",
    "SCRIPTED",
    "SUPERVISED",
    "BackendRequest",
    "EngineName",
    "OpenBackend",
    "Totals",
    "check_engine",
    "engine_help",
    "on_servers",
    "open_backend",
]

Totals = Callable[[], dict[str, dict[str, Any]]]
"""Engine → its counters so far (see `EnginePool.totals`)."""

DEFAULT_ENGINE = "embedded"
SUPERVISED = "supervised"
SCRIPTED = "scripted"
SERVERS = "fleet"
SERVER_SCHEMES = ("http://", "https://")


@dataclass(frozen=True)
class BackendRequest:
    """What is to be served: a base, and variants of a shelf.

    `names` are the variants that may be asked for, None for the base: they are checked, and engines have room for
    their adapters. Those in `ready` are loaded at the start. `scripted` makes the fake backend of the engine name
    `scripted`.
    """

    shelf: Shelf
    settings: Settings
    base: str | Path = DEFAULT_BASE
    names: tuple[str | None, ...] = ()
    ready: tuple[str | None, ...] = ()
    scripted: Callable[[], Backend] | None = None
    on_event: OnEvent = lambda event: None
    on_abandoned: Callable[[Ask, Usage], None] | None = None


@dataclass(frozen=True)
class OpenBackend:
    """An opened backend, and what is known of the engines or servers behind it.

    `base` is the fingerprint of the base's weights, "" where servers have them; `model` identifies the base as exactly
    as is known, so that replies of different bases are kept apart; `base_folder` is the base's checkpoint where this
    process or its children hold the engines, with each checkpoint loaded once: only then is their memory known.
    `settings` are those that engines were started with, `totals` and `checkpoint_totals` their counters, by engine and
    by checkpoint. `start` starts the engines, None where there is nothing left to start: what is not started by it
    starts when it is first asked.
    """

    backend: Backend
    settings: EngineSettings
    base: str = ""
    model: str = ""
    base_folder: Path | None = None
    totals: Totals | None = None
    start: Callable[[], Awaitable[None]] | None = None
    checkpoint_totals: Totals = field(default=dict)


@dataclass(frozen=True)
class _Engine:
    what: str
    open: Callable[[str, BackendRequest], AbstractAsyncContextManager[OpenBackend]]


@asynccontextmanager
async def _open_scripted(engine: str, request: BackendRequest) -> AsyncGenerator[OpenBackend]:
    if request.scripted is None:
        raise SettingsError(
            "engine 'scripted' without a workflow whose fake it is",
            expected=_expected(without=SCRIPTED),
            remedy="Choose another engine, or pass a `backend`.",
        )
    yield OpenBackend(request.scripted(), request.settings.engine, model=SCRIPTED)


@asynccontextmanager
async def _open_pool(engine: str, request: BackendRequest) -> AsyncGenerator[OpenBackend]:
    from .engines.pool import EnginePool

    local = await _on_this_machine(request)
    threads = engine_threads(local.settings.threads)
    if threads.threads != local.settings.thread_count:
        request.on_event(Event(kind="preparing", data={"what": f"engines compute on {threads}"}))
    settings = local.settings.model_copy(update={"threads": threads.threads})
    async with EnginePool(
        local.base_folder,
        local.resolve,
        settings,
        supervised=engine == SUPERVISED,
        adapters=local.adapters,
        on_event=request.on_event,
        on_abandoned=request.on_abandoned,
    ) as pool:
        await pool.check(request.ready)
        yield OpenBackend(
            pool,
            settings,
            local.base,
            local.base,
            local.base_folder,
            pool.totals,
            partial(pool.warm, request.ready),
            pool.checkpoint_totals,
        )


@asynccontextmanager
async def _open_ray(engine: str, request: BackendRequest) -> AsyncGenerator[OpenBackend]:
    from .ray.backend import RayBackend

    local = await _on_this_machine(request)
    async with RayBackend(
        local.base_folder,
        local.resolve,
        request.settings.ray,
        local.settings,
        adapters=local.adapters,
        on_event=request.on_event,
        on_abandoned=request.on_abandoned,
    ) as replicas:
        await replicas.warm(request.ready)
        yield OpenBackend(replicas, local.settings, local.base, local.base, totals=replicas.totals)


@asynccontextmanager
async def _open_fleet(engine: str, request: BackendRequest) -> AsyncGenerator[OpenBackend]:
    from .remote.fleet import Fleet

    fleet = request.settings.fleet
    async with Fleet(
        fleet if engine == SERVERS else fleet.of(engine.split(",")),
        partial(_resolve, request.shelf),
        request.settings.remote,
        api_key=os.environ.get(API_KEY_VARIABLE),
        on_event=request.on_event,
    ) as servers:
        await servers.warm(request.names)
        yield OpenBackend(servers, request.settings.engine, model=servers.model, totals=servers.totals)


@asynccontextmanager
async def _open_server(engine: str, request: BackendRequest) -> AsyncGenerator[OpenBackend]:
    from .remote.remote_backend import RemoteBackend

    async with RemoteBackend(
        engine,
        partial(_resolve, request.shelf),
        request.settings.remote,
        api_key=os.environ.get(API_KEY_VARIABLE),
    ) as server:
        await server.warm(request.names)
        yield OpenBackend(server, request.settings.engine, model=server.model)


ENGINES: Mapping[str, _Engine] = {
    DEFAULT_ENGINE: _Engine("in this process", _open_pool),
    SUPERVISED: _Engine("in processes of its own, started again when they die", _open_pool),
    SCRIPTED: _Engine("the workflow file's fake", _open_scripted),
    "ray": _Engine("replicas on Ray Serve", _open_ray),
    SERVERS: _Engine("the servers of the settings", _open_fleet),
}
"""Engine → what it is, and how it is opened. Beside these, the URL of a server, or of several with commas between."""


def check_engine(engine: str) -> str:
    """The name of an engine, or URLs; raises SettingsError for what is neither."""
    if engine not in ENGINES and not on_servers(engine):
        raise SettingsError(
            f"there is no engine {engine!r}",
            expected=_expected(),
            remedy=did_you_mean(engine, ENGINES, "A server's URL begins with http:// or https://."),
        )
    return engine


EngineName = Annotated[str, AfterValidator(check_engine)]
"""A name in `ENGINES`, or `URL[,URL…]`; checked wherever a pydantic model has a field of this type."""


def on_servers(engine: str) -> bool:
    """Whether servers elsewhere answer: the fleet of the settings, or URLs."""
    return engine == SERVERS or all(url.strip().startswith(SERVER_SCHEMES) for url in engine.split(","))


def engine_help() -> str:
    """One line on every engine, for `--help`."""
    named = ", ".join(f"{name} ({engine.what})" for name, engine in ENGINES.items())
    return f"{named}, or URL[,URL…] of servers."


def open_backend(engine: str, request: BackendRequest) -> AbstractAsyncContextManager[OpenBackend]:
    """Start an engine, or connect to servers, for a base and variants; all of it is closed at the end.

    Raises: SettingsError for an engine that does not exist or cannot serve this; on entering, BaseModelError,
    UnknownVariantError, AdapterError, EngineError and EngineDeadError (what is asked for cannot be served).
    """
    check_engine(engine)
    if engine in ENGINES:
        return ENGINES[engine].open(engine, request)
    return (_open_fleet if "," in engine else _open_server)(engine, request)


@dataclass(frozen=True)
class _OnThisMachine:
    """A base and variants as engines on this machine are started with them."""

    base_folder: Path
    base: str
    settings: EngineSettings
    adapters: set[str]
    resolve: Callable[[str], tuple[Variant, Path]]


async def _on_this_machine(request: BackendRequest) -> _OnThisMachine:
    # Imported here: sessions on another backend need none of it.
    from ..specializers.shelf.base_model import base_fingerprint, find_base

    known = {name: _resolve(request.shelf, name) for name in dict.fromkeys(request.names) if name is not None}
    wanted = [variant for variant, _ in known.values()]

    def show(what: str) -> None:
        from_thread.run_sync(request.on_event, Event(kind="preparing", data={"what": what}))

    folder = await to_thread.run_sync(partial(find_base, str(request.base), progress=show))
    return _OnThisMachine(
        base_folder=folder,
        base=await to_thread.run_sync(base_fingerprint, folder),
        settings=request.settings.engine.with_room_for(variant.ask.rank for variant in wanted),
        adapters={variant.checkpoint for variant in wanted if variant.ask.adapter},
        resolve=lambda name: known.get(name) or _resolve(request.shelf, name),
    )


def _resolve(shelf: Shelf, name: str) -> tuple[Variant, Path]:
    variant = shelf.get(name)
    return variant, shelf.path(variant)


def _expected(without: str = "") -> str:
    return f"{', '.join(name for name in ENGINES if name != without)}, or the URL of a server"
