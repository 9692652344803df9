"""User code in threads that hold no process open: a function that never returns must not keep `metier run` from ending.

Threads of anyio and of `concurrent.futures` are waited for when the interpreter ends, also those of calls that were
given up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import anyio
from anyio import CapacityLimiter, from_thread, to_thread
from anyio.lowlevel import current_token

__all__ = ["run_in_thread"]


async def run_in_thread(function: Callable[[], Any], limiter: CapacityLimiter | None = None) -> Any:
    """Call a function in a daemon thread and return or raise what it does; a cancelled caller leaves it behind.

    The thread counts for `limiter` (by default anyio's own) until the function returns, not until it is given up.
    """
    token, context, finished = current_token(), copy_context(), anyio.Event()
    limiter = limiter or to_thread.current_default_thread_limiter()
    result: list[Any] = []
    error: list[BaseException] = []
    borrower = object()
    await limiter.acquire_on_behalf_of(borrower)

    def end() -> None:
        limiter.release_on_behalf_of(borrower)
        finished.set()

    def work() -> None:
        try:
            result.append(context.run(function))
        except BaseException as raised:
            error.append(raised)
        with suppress(Exception):  # the loop may have ended, with nobody left to tell
            from_thread.run_sync(end, token=token)

    try:
        threading.Thread(target=work, name="user code", daemon=True).start()
    except RuntimeError:  # the system has no thread left
        limiter.release_on_behalf_of(borrower)
        raise
    await finished.wait()
    if error:
        raise error[0]
    return result[0]
