"""User code in threads: its result, its errors, its context; and what never returns holds nothing up."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading

import anyio
import pytest

from metier.runtime.worker_threads import run_in_thread

NEVER_RETURNS = """
import sys, threading, anyio
from metier.runtime.worker_threads import run_in_thread

async def main():
    with anyio.move_on_after(0.05):
        await run_in_thread(threading.Event().wait)

anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.anyio
async def test_a_function_gives_its_result_or_its_error_in_the_callers_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("mine")
    assert await run_in_thread(lambda: (variable.get(), threading.current_thread().daemon)) == ("mine", True)
    with pytest.raises(ZeroDivisionError):
        await run_in_thread(lambda: 1 // 0)


@pytest.mark.anyio
async def test_a_thread_counts_until_its_function_returns() -> None:
    limiter, release = anyio.CapacityLimiter(1), threading.Event()
    with anyio.move_on_after(0.01):
        await run_in_thread(release.wait, limiter)
    assert limiter.borrowed_tokens == 1
    release.set()
    assert await run_in_thread(lambda: "next", limiter) == "next"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_process_ends_although_a_function_never_returns(backend: str) -> None:
    assert subprocess.run([sys.executable, "-c", NEVER_RETURNS, backend], timeout=60).returncode == 0
