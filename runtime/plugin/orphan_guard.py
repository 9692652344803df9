"""Processes of an engine end with the process that started them, also when that is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["GUARDED_BY", "end_with_parent", "guard_children"]

GUARDED_BY = "METIER_ENGINE_HOST"
"""Variable with the process id of the host that an engine's processes belong to."""

_PR_SET_PDEATHSIG = 1


def guard_children() -> None:
    """Called in a host: the engine's processes started from here on end with their parents.

    The process that supervises the host ends them too, but may die first; Ray kills the children of a worker that ends,
    not its grandchildren.
    """
    os.environ[GUARDED_BY] = str(os.getpid())


def end_with_parent() -> None:
    """Called in each process of an engine: have the kernel kill this one when its parent has died (Linux)."""
    host = os.environ.get(GUARDED_BY, "")
    if sys.platform != "linux" or not host or host == str(os.getpid()):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1 and host != "1":  # the parent has died already
        os._exit(1)
