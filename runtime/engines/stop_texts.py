"""Ends an answer before the first text that stops it, however that text is split into pieces."""

from __future__ import annotations

__all__ = ["StopTexts"]


class StopTexts:
    """Passes an answer on up to the first of the texts that end it; holds back what may be the beginning of one.

    >>> stop = StopTexts(("END",))
    >>> [stop.read(piece) for piece in ("one E", "N two E", "ND three")], stop.found
    (['one ', 'EN two ', ''], True)
    """

    def __init__(self, texts: tuple[str, ...] = ()) -> None:
        self._texts = texts
        self._held = ""
        self.found = False
        self.passed = 0
        """Characters passed on."""

    @property
    def length(self) -> int:
        """Characters read and not thrown away."""
        return self.passed + len(self._held)

    def read(self, text: str, *, last: bool = False) -> str:
        """Read one piece, the `last` one perhaps; returns what of it and of what was held back belongs to the answer"""
        if self.found:
            return ""
        self._held += text
        starts = [at for at in (self._held.find(one) for one in self._texts) if at >= 0]
        if starts:
            self.found = True
            passed, self._held = self._held[: min(starts)], ""
        else:
            kept = 0 if last else self._may_begin()
            passed, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self.passed += len(passed)
        return passed

    def _may_begin(self) -> int:
        """Characters at the end of what is held that may be the beginning of a text."""
        most = min(max((len(one) for one in self._texts), default=1) - 1, len(self._held))
        ends = (
            length for length in range(most, 0, -1) if any(one.startswith(self._held[-length:]) for one in self._texts)
        )
        return next(ends, 0)
