"""What `open_session` returns: a session that is opened by `async with`, or by `with` in plain code."""

from __future__ import annotations

import atexit
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from ...agents.errors import SessionError
from .session import Session
from .sync_session import SyncSession, check_no_loop

__all__ = ["SessionOpening", "opened_either_way"]

P = ParamSpec("P")


def opened_either_way(function: Callable[P, AsyncGenerator[Session]]) -> Callable[P, SessionOpening]:
    """Make of a function that yields a session one whose result `async with` opens, and `with` too."""
    opened = asynccontextmanager(function)

    @wraps(function)
    def opening(*args: P.args, **kwargs: P.kwargs) -> SessionOpening:
        return SessionOpening(opened(*args, **kwargs))

    return opening


class SessionOpening(AbstractAsyncContextManager[Session]):
    """What `open_session` returns: entered once, by `async with`, by `with`, or by `start`."""

    def __init__(self, opened: AbstractAsyncContextManager[Session]) -> None:
        self._opened = opened
        self._entered = False
        self._sync: SyncSession | None = None

    async def __aenter__(self) -> Session:
        return await self._once().__aenter__()

    async def __aexit__(self, *exc: Any) -> bool | None:
        return await self._opened.__aexit__(*exc)

    def __enter__(self) -> SyncSession:
        check_no_loop()
        self._sync = SyncSession(self._once())
        return self._sync.__enter__()

    def __exit__(self, *exc: object) -> None:
        if self._sync is not None:
            self._sync.__exit__(*exc)

    def start(self) -> SyncSession:
        """Open a plain session without a block, for the cells of a notebook: `session.close()` ends it.

        One that was not closed is closed when the interpreter ends.
        """
        session = self.__enter__()
        atexit.register(session.close)
        return session

    def _once(self) -> AbstractAsyncContextManager[Session]:
        if self._entered:
            raise SessionError(
                "this session was opened before",
                expected="one `with` or `async with` for each call of `open_session`",
                remedy="Call `open_session(…)` again.",
            )
        self._entered = True
        return self._opened

    if not TYPE_CHECKING:  # type checkers say it themselves

        def __getattr__(self, name: str) -> Any:
            raise SessionError(
                f"there is no `{name}` before the session is open",
                expected="`with open_session(…) as session`, or `async with` in `async` code",
                remedy=f"Use `session.{name}` inside that block.",
            )
