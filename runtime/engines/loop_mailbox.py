"""Delivery from a thread to the event loop that waits: many results, one wake-up, asyncio or trio."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from ...agents.backend import OnText

__all__ = ["LoopMailbox", "Mailboxes", "Promise", "deliver"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


class LoopMailbox:
    """Calls posted by a thread and run in the event loop this was made in.

    `post` only queues; `flush` wakes the loop once for all that was queued. Waking the loop for each waiter
    would make the posting thread wait for the interpreter lock again and again.
    """

    def __init__(self) -> None:
        self.loop: object = current_token().native_token
        wake = getattr(self.loop, "call_soon_threadsafe", None) or cast(Any, self.loop).run_sync_soon
        self._wake: Callable[[Callable[[], None]], object] = wake
        self._calls: deque[Callable[[], None]] = deque()

    def post(self, call: Callable[[], None]) -> None:
        """Queue `call`; it runs in the loop after the next `flush`."""
        self._calls.append(call)

    def flush(self) -> None:
        """Wake the loop if anything is queued. A loop that has ended takes its calls with it."""
        if self._calls:
            try:
                self._wake(self._deliver)
            except RuntimeError:  # the loop is closed; trio's RunFinishedError is a RuntimeError too
                self._calls.clear()

    def _deliver(self) -> None:
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:
                # An exception of one callback must not keep the others from their replies (and trio would
                # take an error raised here for its own).
                _log.exception("a callback of an engine reply failed")


class Mailboxes:
    """One mailbox per event loop: a test suite, or a program with two loops, may use one engine from both."""

    def __init__(self) -> None:
        self._kept: dict[int, LoopMailbox] = {}

    def here(self) -> LoopMailbox:
        """The mailbox of the loop this is called in."""
        mailbox = LoopMailbox()
        kept = self._kept.get(id(mailbox.loop))
        if kept is None or kept.loop is not mailbox.loop:  # ids are used again
            self._kept[id(mailbox.loop)] = kept = mailbox
        return kept


class Promise(Generic[T]):
    """A value or an error that the event loop waits for; set inside the loop, once."""

    def __init__(self) -> None:
        self._done = anyio.Event()
        self._value: T | None = None
        self._error: BaseException | None = None

    def succeed(self, value: T) -> None:
        """Set the value and wake the waiting task; the first outcome stays."""
        if not self._done.is_set():
            self._value = value
            self._done.set()

    def fail(self, error: BaseException) -> None:
        """Set the error and wake the waiting task; the first outcome stays."""
        if not self._done.is_set():
            self._error = error
            self._done.set()

    async def wait(self) -> T:
        """Return the value, or raise the error."""
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return cast(T, self._value)


def deliver(on_text: OnText, piece: str, promise: Promise[Any]) -> None:
    """Call the asker's `on_text` with a piece; an error it raises fails the asker's ask, not the delivery."""
    try:
        on_text(piece)
    except Exception as error:
        promise.fail(error)
