"""A session for plain code: the same methods, each of which waits until it is done.

The session itself lives on an event loop in a thread of its own, so that it can be used from scripts, notebook cells
and the threads of web handlers, from several at the same time.
"""

from __future__ import annotations

import atexit
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from anyio import CancelScope
from anyio.from_thread import start_blocking_portal
from anyio.lowlevel import current_token

from ...agents.errors import SessionError
from ..notebook import in_notebook
from .conversation import Conversation, SpokenTurn
from .session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from anyio.from_thread import BlockingPortal

    from ...router.assignment import Assignment
    from ..settings.session import Settings

__all__ = ["SyncConversation", "SyncSession", "check_no_loop"]

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


class _Plain(ABC, Generic[S]):
    """Stands for an object of the session's loop, in code that waits."""

    _inside: S

    @abstractmethod
    def _wait(self, work: Callable[[], Awaitable[T]]) -> T: ...


def _waiting(
    method: Callable[Concatenate[S, P], Awaitable[T]],
) -> Callable[Concatenate[_Plain[S], P], T]:
    """A method as one that waits for its result."""

    @wraps(method)
    def wait(self: _Plain[S], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(partial(method, self._inside, *args, **kwargs))

    return wait


def _calling(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[_Plain[S], P], T]:
    """A method that does not wait, called on the session's own thread."""

    @wraps(method)
    def call(self: _Plain[S], /, *args: P.args, **kwargs: P.kwargs) -> T:
        async def work() -> T:
            return method(self._inside, *args, **kwargs)

        return self._wait(work)

    return call


def _watching(
    method: Callable[Concatenate[Session, P], AbstractAsyncContextManager[AsyncIterator[T]]],
) -> Callable[Concatenate[SyncSession, P], AbstractContextManager[Iterator[T]]]:
    """A method of a Session that gives what happens, piece by piece, as a plain `with` and a plain iterator."""

    @wraps(method)
    @contextmanager
    def watch(self: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Iterator[T]]:
        with self._entered(method(self._inside, *args, **kwargs)) as pieces:
            yield self._each(pieces)

    return watch


def _talking(
    method: Callable[Concatenate[Session, P], AbstractAsyncContextManager[Conversation]],
) -> Callable[Concatenate[SyncSession, P], AbstractContextManager[SyncConversation]]:
    """A method of a Session that opens a conversation, as a plain `with`."""

    @wraps(method)
    @contextmanager
    def talk(self: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[SyncConversation]:
        with self._entered(method(self._inside, *args, **kwargs)) as conversation:
            yield SyncConversation(conversation, self)

    return talk


class SyncConversation(_Plain[Conversation]):
    """A conversation of a plain session, `with session.chat(role) as chat`: `chat.say("…")` waits for the reply."""

    say = _waiting(Conversation.say)
    go_on = _waiting(Conversation.go_on)

    def __init__(self, conversation: Conversation, session: SyncSession) -> None:
        self._inside = conversation
        self._session = session

    def _wait(self, work: Callable[[], Awaitable[T]]) -> T:
        return self._session._wait(work)

    @property
    def id(self) -> str:
        """Names the conversation in its store: `chat(…, resume=id)` goes on with it."""
        return self._inside.id

    @property
    def turns(self) -> list[SpokenTurn]:
        """Every turn from the first on, also those whose run is not finished."""
        return self._inside.turns

    @property
    def unfinished(self) -> SpokenTurn | None:
        """The last turn, when its run is not finished."""
        return self._inside.unfinished


class SyncSession(_Plain[Session]):
    """What `with open_session(…) as session` gives: a Session whose methods wait, for code that is not `async`.

    Ctrl-C stops what is under way and leaves the session usable. Raises SessionError when it is closed, and when it is
    used where it would hold an event loop up: inside `async def`, except in a notebook's cells.

    >>> from pydantic import BaseModel
    >>> from metier.agents import Role, ScriptedBackend, TaskGraph
    >>> from metier.runtime import open_session
    >>> class Puzzle(BaseModel):
    ...     text: str
    >>> graph = TaskGraph("solve", takes=Puzzle, gives=str)
    >>> solve = graph.step(Role("solver", takes=Puzzle, gives=str))
    >>> with open_session(backend=ScriptedBackend(default=lambda ask: "4"), store=":memory:") as session:
    ...     answer = session.run(graph, Puzzle(text="2 + 2"))
    ...     results = session.map(graph, [Puzzle(text="1 + 3"), Puzzle(text="4 + 0")])
    >>> answer, [result.output for result in results]
    ('4', ['4', '4'])
    """

    _portal: BlockingPortal

    start_engines = _waiting(Session.start_engines)
    run = _waiting(Session.run)
    map = _waiting(Session.map)
    ask = _waiting(Session.ask)
    resume = _waiting(Session.resume)
    resume_batch = _waiting(Session.resume_batch)
    prepare = _calling(Session.prepare)
    report = _calling(Session.report)
    engine_totals = _calling(Session.engine_totals)
    listen = _calling(Session.listen)
    stream = _watching(Session.stream)
    chat = _talking(Session.chat)

    def __init__(self, opening: AbstractAsyncContextManager[Session]) -> None:
        self._opening = opening
        self._calls: set[_Call[Any]] = set()
        self._open = False

    def __enter__(self) -> Self:
        self._loop = start_blocking_portal(name="metier session")
        self._portal = self._loop.__enter__()
        self._opened = self._portal.wrap_async_context_manager(self._opening)
        try:
            self._inside = self._opened.__enter__()
        except BaseException as error:  # which ends what Ctrl-C has left half open
            self._loop.__exit__(type(error), error, error.__traceback__)
            raise
        self._open = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it, and end what other threads wait for; closing twice is harmless."""
        atexit.unregister(self.close)
        if not self._open:
            return
        self._open = False
        for call in list(self._calls):  # of other threads
            call.stop(self._portal)
        try:
            self._opened.__exit__(None, None, None)
        finally:
            self._portal.call(self._portal.stop, True)
            self._loop.__exit__(None, None, None)

    @property
    def batch(self) -> str | None:
        """Id of the batch that was started or resumed last."""
        return self._inside.batch

    @property
    def base(self) -> str:
        """Fingerprint of the base model of this session's engines, "" where it is not known."""
        return self._inside.base

    @property
    def assignment(self) -> Assignment:
        """Which variant plays which role."""
        return self._inside.assignment

    @property
    def settings(self) -> Settings:
        """The settings it was opened with."""
        return self._inside.settings

    def _wait(self, work: Callable[[], Awaitable[T]]) -> T:
        self._check_usable()
        call = _Call(work)
        self._calls.add(call)
        try:
            return self._portal.start_task_soon(call.run).result()
        except CancelledError as error:
            raise SessionError(
                "the session was closed while this was under way",
                expected="an open session",
                remedy="End the `with` block of `open_session` after the last call of its session.",
            ) from error
        except BaseException:  # Ctrl-C: what is under way ends before the caller goes on
            call.stop(self._portal)
            raise
        finally:
            self._calls.discard(call)

    @contextmanager
    def _entered(self, opening: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Something of the session's loop while a plain `with` lasts."""
        self._check_usable()
        opened = self._portal.wrap_async_context_manager(opening)
        inside = opened.__enter__()
        try:
            yield inside
        finally:
            # Without the error of the block, which a task group inside would wrap in an exception group.
            opened.__exit__(None, None, None)

    def _each(self, pieces: AsyncIterator[T]) -> Iterator[T]:
        with suppress(StopAsyncIteration):
            while True:
                yield self._wait(pieces.__anext__)

    def _check_usable(self) -> None:
        if not self._open:
            raise SessionError(
                "the session is closed",
                expected="an open session",
                remedy="Use it inside the block of `with open_session(…) as session`.",
            )
        check_no_loop()


class _Call(Generic[T]):
    """Something that a thread waits for, and that can be stopped from any thread at any moment."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._work = work
        self._scope: CancelScope | None = None
        self._stopped = False
        self._ended = threading.Event()

    async def run(self) -> T:
        """Do the work. Raises: CancelledError when it was stopped."""
        try:
            with CancelScope() as self._scope:
                if self._stopped:
                    self._scope.cancel()
                return await self._work()
            raise CancelledError
        finally:
            self._ended.set()

    def stop(self, portal: BlockingPortal) -> None:
        """Cancel it and wait for its end; one that has not begun ends as soon as it does."""
        self._stopped = True
        if self._scope is not None and not self._ended.is_set():
            portal.call(self._scope.cancel)
            self._ended.wait()


def check_no_loop() -> None:
    """Refuse to wait where an event loop runs. Raises: SessionError."""
    if _on_loop() and not in_notebook():
        raise SessionError(
            "a plain session would hold up the event loop that runs here",
            expected="`with open_session(…)` in code that is not `async`",
            remedy="Write `async with open_session(…) as session` and `await session.run(…)`.",
        )


def _on_loop() -> bool:
    try:
        current_token()
    except RuntimeError:
        return False
    return True
