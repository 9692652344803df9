"""When something was, as the run store keeps it."""

from __future__ import annotations

import time

__all__ = ["stamp_s"]

_WALL_AT_ZERO_S = time.time() - time.monotonic()
"""What the wall clock would have shown when the monotonic clock stood at 0; read once, when this process begins."""


def stamp_s() -> float:
    """Now, in seconds since 1970: the wall clock as it was when this process began, and the monotonic clock since.

    The stamps of one process never go back, and what lies between two of them is a duration, whatever is done to the
    wall clock meanwhile. Stamps of two processes are as far apart as the wall clock was when each of them began.
    """
    return _WALL_AT_ZERO_S + time.monotonic()
