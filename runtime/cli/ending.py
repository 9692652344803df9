"""How a command ends: its exit status, one line for an error on purpose, and one after a signal: how to go on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from ...agents.errors import (
    AssignmentError,
    GraphError,
    MetierError,
    ProfileError,
    RecipeError,
    RunInterrupted,
    ServerError,
    SettingsError,
    StoreError,
    TaskSetError,
    VariantError,
    first_error,
)
from ..console import say

__all__ = ["SAME_COMMAND", "end_with", "when_stopped"]

EXIT_FAILED = 1
EXIT_TO_MEND = 2
EXIT_WAITS = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

TO_MEND = (
    AssignmentError, GraphError, ProfileError, RecipeError, ServerError, SettingsError, StoreError, TaskSetError,
    VariantError,
)  # fmt: skip
"""What the user mends: files, options, disks. Other errors are a run's, an engine's, or ours."""

SAME_COMMAND = "What was recorded is kept: the same command goes on."
"""What verbs say that find what they had when they are stopped and started again."""

_how_to_go_on: list[Callable[[], str]] = [lambda: ""]


def when_stopped(how: Callable[[], str]) -> None:
    """From now on, say `how()` when a signal stops this command: what is kept, and how to go on."""
    _how_to_go_on[:] = [how]


def end_with(command: Callable[[], Any]) -> NoReturn:
    """Do a command and end the process with its status; an unforeseen error is a traceback."""
    with _terminated_as_by_ctrl_c() as terminated:
        try:
            command()
        except BaseExceptionGroup as group:
            error = first_error(group)
            if not isinstance(error, MetierError):
                raise
            sys.exit(_told(error))
        except MetierError as error:
            sys.exit(_told(error))
        except SystemExit as done:
            if not terminated and done.code != EXIT_INTERRUPTED:
                raise
    say(f"Stopped. {_how_to_go_on[0]()}".rstrip())
    sys.exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED)


def _told(error: MetierError) -> int:
    """Say an error in one line; the exit status that goes with it."""
    if isinstance(error, RunInterrupted):
        say(str(error), style="yellow")
        return EXIT_WAITS
    say(f"{type(error).__name__}: {error}", style="red")
    return EXIT_TO_MEND if isinstance(error, TO_MEND) else EXIT_FAILED


@contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM stops what Ctrl-C stops, in the same way; yields a list that holds the signal once it came."""
    terminated: list[int] = []
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a fork of ours, whose end is not ours to say
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        terminated.append(number)
        interrupt = signal.getsignal(signal.SIGINT)
        assert callable(interrupt)
        interrupt(signal.SIGINT, frame)

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job: Ctrl-C stays without effect, and yet there is a handler for SIGTERM to call.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)
