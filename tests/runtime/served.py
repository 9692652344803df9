"""A server in a thread of the test's process, on a backend of the test's own: real sockets, no model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
from anyio.lowlevel import current_token

from metier.agents import Ask, Role, ScriptedBackend, TaskGraph
from metier.agents.backend import Backend
from metier.router import Assignment
from metier.runtime import RunStore, Settings, open_session
from metier.runtime.server.app import MetierApp, make_app
from metier.runtime.server.served_models import ServedWorkflow
from metier.runtime.server.serving import listen_on, loop_options, new_server
from metier.runtime.settings.session import load_settings
from tests.agents.workflow import Answer, Plan, Puzzle

planner = Role("planner", takes=Puzzle, gives=Plan, instructions="Turn the puzzle into one expression.")
solver = Role("solver", takes=Plan, gives=Answer, instructions="Evaluate it.", max_tokens=32)
graph = TaskGraph("chain", takes=Puzzle, gives=Answer)
graph.step(solver, after=graph.step(planner))
WORKFLOWS = [ServedWorkflow(graph.build())]


def scripted() -> ScriptedBackend:
    """Plans anything, solves it with 4, and says `said` to whoever names a variant."""
    return ScriptedBackend(
        {"planner": lambda ask: Plan(expression="2 + 2"), "solver": lambda ask: Answer(value=4)},
        default=lambda ask: "<think>let me see</think>one two three",
    )


class Gate:
    """A backend whose asks wait until they are let through; `arrived` is released by each that comes."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.cancelled = threading.Semaphore(0)
        self._waiting: list[tuple[Any, anyio.Event]] = []
        self._inner = scripted()
        self._opened = False

    def open(self) -> None:
        """Let all asks through, those that wait and those to come; called from the test's own thread."""
        self._opened = True
        for token, event in self._waiting:
            anyio.from_thread.run_sync(event.set, token=token)

    async def reply(self, ask: Ask, *, on_text: Any = None) -> Any:
        """Wait, then answer as the script does."""
        event = anyio.Event()
        self._waiting.append((current_token(), event))
        self.arrived.release()
        try:
            if not self._opened:
                await event.wait()
        except BaseException:
            self.cancelled.release()
            raise
        return await self._inner.reply(ask, on_text=on_text)


@dataclass
class Served:
    """A running server and what is in it."""

    url: str
    app: MetierApp
    store: RunStore
    stop: Callable[[], None]


@contextmanager
def server(
    backend: Backend | None = None,
    *,
    settings: Settings | None = None,
    assignment: Assignment | None = None,
    key: str | None = None,
    workflows: list[ServedWorkflow] = WORKFLOWS,
    store: Path | str = ":memory:",
    **options: Any,
) -> Iterator[Served]:
    """A server on a free port, stopped and drained at the end of the block."""
    settings = settings or load_settings(overrides={"server.drain_s": 1.0})
    listening = listen_on("127.0.0.1", 0)
    ready = threading.Event()
    kept: dict[str, Any] = {}

    async def main() -> None:
        if backend is not None:
            options["backend"] = backend
        async with open_session(assignment=assignment, store=store, settings=settings, **options) as session:
            await session.start_engines()  # as `metier serve` does
            app = make_app(session, workflows, key=key, variants=options.get("variants", ()))
            async with anyio.create_task_group() as tasks:
                kept.update(app=app, store=session.store)
                kept["server"] = running = new_server(app, settings.server)
                tasks.start_soon(running.serve, [listening])
                ready.set()  # it listens already: whoever connects waits until it has started

    thread = threading.Thread(target=partial(anyio.run, main, backend_options=loop_options()), daemon=True)
    thread.start()
    assert ready.wait(120), "the server did not start"

    def stop() -> None:
        kept["server"].handle_exit(15, None)

    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Served(url, kept["app"], kept["store"], stop)
    finally:
        stop()
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
