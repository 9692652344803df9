"""Doing it: engines, runs, records. Engines are imported when a session opens one, never before."""

from .events import Event
from .opening import open_session, run
from .report import render_report
from .runs.run_plan import RunResult
from .runs.session import Session
from .runs.sync_session import SyncSession
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
    "SyncSession",
    "load_settings",
    "open_session",
    "render_report",
    "run",
]
