"""Running the server: its socket, its key, its session, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from functools import partial
from importlib.util import find_spec
from typing import Any

import uvicorn

from ...agents.errors import ServerError
from ..settings.server import ServerSettings
from ..settings.session import API_KEY_VARIABLE
from .app import MetierApp
from .bounded_connection import BoundedConnection, OpenConnections
from .request_checks import is_loopback

__all__ = ["api_key", "listen_on", "loop_options", "new_server", "serve"]

log = logging.getLogger("uvicorn.error")

BACKLOG = 2048
"""Connections that the kernel keeps for us until they are accepted."""


def api_key(host: str) -> str | None:
    """The key of the environment; raises ServerError when an address that others can reach has none."""
    key = os.environ.get(API_KEY_VARIABLE, "").strip() or None
    if key is None and not is_loopback(host):
        raise ServerError(
            f"host {host} can be reached from other machines, and {API_KEY_VARIABLE} is not set",
            expected="a key in the environment, or --host 127.0.0.1",
            remedy=f"Set {API_KEY_VARIABLE} to a secret that clients give as their API key.",
        )
    return key


def listen_on(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything costly starts; port 0 takes one that is free.

    Raises: ServerError when the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ServerError(
            f"cannot listen on {host} port {port}: {error}",
            expected="a free port of this machine",
            remedy="Name another with --port (0 takes any), or stop what listens there.",
        ) from error


def loop_options() -> dict[str, Any]:
    """Options for `anyio.run`: the faster event loop, where it is installed."""
    return {"use_uvloop": find_spec("uvloop") is not None}


async def serve(app: MetierApp, listening: socket.socket, settings: ServerSettings) -> None:
    """Answer until SIGTERM or SIGINT, then let what is under way end within `drain_s`. Asyncio only."""
    await new_server(app, settings).serve(sockets=[listening])


def new_server(app: MetierApp, settings: ServerSettings) -> uvicorn.Server:
    """The HTTP server over the application, not yet started; `handle_exit` drains and stops it."""
    connection: Any = partial(BoundedConnection, opened=OpenConnections(settings))
    config = uvicorn.Config(
        app,
        http=connection,
        timeout_keep_alive=settings.idle_timeout_s,
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=max(int(settings.drain_s), 1),
        server_header=False,
    )
    return _Server(config, app.drain)


class _Server(uvicorn.Server):
    """Says that it stops before it does, and leaves the end of the process to the program: engines close first."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A first signal drains, a second one does not wait any more."""
        if self.should_exit:
            self.force_exit = True
            log.setLevel(logging.CRITICAL)  # the application is cut off, and uvicorn would show where
        else:
            self.should_exit = True  # first: the second signal may come as soon as the first is answered
            log.warning("stopping: what is under way may end; once more, and it may not")
            self._on_exit()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: close the connections whose clients are late."""
        now_s = asyncio.get_running_loop().time()
        for connection in [*self.server_state.connections]:
            if isinstance(connection, BoundedConnection):
                connection.check(now_s)
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are ours while we serve; uvicorn would raise them again at its end, before the session closes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
