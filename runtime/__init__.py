"""Doing it: engines, runs, records. Engines are imported when a session opens one, never before."""

from .events import Event
from .opening import open_session
from .report import render_report
from .session import RunResult, Session
from .settings import Settings, load_settings
from .steps import RunLimits
from .store import RunStore

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
