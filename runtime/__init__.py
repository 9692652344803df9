"""Doing it: engines, runs, records. Engines are imported when a session opens one, never before."""

from .events import Event
from .opening import open_session
from .report import render_report
from .runs.run_plan import RunResult
from .runs.session import Session
from .settings.limits import RunLimits
from .settings.session import Settings, load_settings
from .store.store import RunStore

__all__ = [
    "Event",
    "RunLimits",
    "RunResult",
    "RunStore",
    "Session",
    "Settings",
    "load_settings",
    "open_session",
    "render_report",
]
