"""No fcntl, no sched_getaffinity and no /proc, as on other systems: with this folder first in PYTHONPATH.

Python imports a module of this name before all else, in the processes that a test starts too.
"""

from __future__ import annotations

import os
import sys
from typing import Any

LISTED = ("open", "os.listdir", "os.scandir", "os.chdir")
"""Audit events of what reads a file or a folder; the first argument is its path."""


def take_away() -> None:
    """Take them away from this process."""
    sys.modules["fcntl"] = None  # type: ignore[assignment]
    for name in ("sched_getaffinity", "sched_setaffinity", "process_cpu_count"):
        if hasattr(os, name):
            delattr(os, name)
    sys.addaudithook(_no_proc)


def _no_proc(event: str, args: tuple[Any, ...]) -> None:
    if event in LISTED and str(args[0]).startswith("/proc") and not _of_psutil():
        raise FileNotFoundError(2, "No such file or directory", str(args[0]))


def _of_psutil() -> bool:
    """Whether psutil reads it, by which tests measure memory: on other systems it asks elsewhere."""
    return "psutil" in sys._getframe(2).f_code.co_filename


take_away()
