"""Notices from outside that a supervised engine hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ...settings.engine import EngineSettings

__all__ = ["HangWatch"]

_SILENT_BEATS = 8
"""Beats that may be missed in a row. The core's last one may come a beat late, and the thread may look a beat late:
together that is within the ten of `hang_timeout_s`."""


class HangWatch:
    """Calls `on_hang` once, in a thread of its own, when `heard` was not called for nearly `hang_timeout_s`.

    Silence is counted in waits and not read from a clock: when this program or the whole machine was stopped
    meanwhile, that counts as one of them.
    """

    def __init__(self, name: str, settings: EngineSettings, on_hang: Callable[[], None]) -> None:
        self._every_s = settings.beat_every_s
        self._on_hang = on_hang
        self._heard = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"metier-{name}-watch", daemon=True)

    def start(self) -> None:
        """Begin to count."""
        self._thread.start()

    def heard(self) -> None:
        """The engine has given a sign of life."""
        self._heard.set()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _watch(self) -> None:
        silent = 0
        while not self._stopped.wait(self._every_s):
            silent = 0 if self._heard.is_set() else silent + 1
            self._heard.clear()
            if silent >= _SILENT_BEATS:
                self._on_hang()
                return
