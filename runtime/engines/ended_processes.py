"""Why processes of an engine have ended, in words: from their exit status, and from what they have printed."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable

__all__ = ["cause_in_log", "cause_of", "how_ended"]

OUT_OF_MEMORY = "the system may have run out of memory"
_SHOWN_CAUSES = 3
_SHOWN_CHARACTERS = 600
_PREFIX = re.compile(r"^(?:\([^()]* pid=\d+\) *)?(?:[A-Z]+ [\d-]+ [\d:.]+ \[[^\]]*\] *)?")
"""What vLLM writes before a line: the process, then level, time and place."""
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)\b(?::.*)?$")
_NO_EXCEPTION = ("std::bad_alloc", "Segmentation fault", "Cannot allocate memory", "Fatal Python error")
_POINTS_ELSEWHERE = re.compile(r"root cause", re.IGNORECASE)
_STATUS = re.compile(r"Failed core proc\(s\): \{[^}]*: -(\d+)")

_NO_STATUS = "Failed core proc(s): {}"
"""What vLLM says when it sees a process end and asks for its status a moment too early."""


def how_ended(statuses: Iterable[int | None]) -> str:
    """How processes have ended, by their exit status: None for one that runs, below 0 for a signal.

    The kernel sends SIGKILL when memory is short; nobody else does by accident.

    >>> how_ended([0, None, -9])
    'was killed (SIGKILL): the system may have run out of memory'
    """
    signals = {-status for status in statuses if status is not None and status < 0}
    if signal.SIGKILL in signals:
        return f"was killed (SIGKILL): {OUT_OF_MEMORY}"
    return f"was ended by {signal.Signals(min(signals)).name}" if signals else "ended"


def cause_of(error: BaseException) -> str:
    """An exception, and the one that it began with where that is another; of killed processes, by what."""
    first = error
    while (before := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = before
    told = _in_short(str(error) or type(error).__name__)
    status = _STATUS.search(told)
    if status is not None:
        return f"{told} (it {how_ended([-int(status[1])])})"
    if _NO_STATUS in told:
        return f"{told} (it ended before its exit status was known; if it was killed, {OUT_OF_MEMORY})"
    return told if first is error or str(first) in told else f"{told} ({_in_short(f'{type(first).__name__}: {first}')})"


def cause_in_log(log: str) -> str:
    """The last exceptions that a log tells of, the oldest first; "" where there are none.

    >>> cause_in_log("(EngineCore pid=7) ERROR 11-30 22:00:00 [core.py:9] ValueError: too few blocks\\nbye")
    'ValueError: too few blocks'
    """
    found: dict[str, None] = {}
    for line in log.splitlines():
        text = _PREFIX.sub("", line).strip()
        tells = _EXCEPTION.match(text) or any(words in text for words in _NO_EXCEPTION)
        if tells and not _POINTS_ELSEWHERE.search(text):
            found.pop(text, None)
            found[text] = None
    return "; ".join(_in_short(text) for text in list(found)[-_SHOWN_CAUSES:])


def _in_short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
