"""What happens while runs go on, as events that the live view, the stream and the report share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

from ..agents.frozen_model import FrozenModel

__all__ = ["STARTUP", "Event", "EventKind", "Listeners", "OnEvent", "RunEvents", "in_words"]

_log = logging.getLogger(__name__)

EventKind = Literal[
    "run_started",
    "run_finished",
    "run_failed",
    "run_interrupted",
    "run_scored",
    "step_started",
    "step_finished",
    "step_skipped",
    "step_failed",
    "round_started",
    "ask_finished",
    "ask_retried",
    "text",
    "partial_answer",
    "adapter_loaded",
    "adapter_evicted",
    "preparing",
    "engine_starting",
    "engine_ready",
    "engine_restarted",
    "server_lost",
    "server_back",
]

STARTUP: tuple[EventKind, ...] = ("preparing", "engine_starting", "engine_ready", "engine_restarted")
"""What is waited for before an engine answers."""


class Event(FrozenModel):
    """One thing that happened while runs went on."""

    kind: EventKind
    """What happened."""

    run_id: str = ""
    """The run it belongs to. Empty for engines."""

    step_path: str = ""
    """The step it belongs to. Empty for runs."""

    role: str = ""
    """The role that asked. Empty where none did."""

    data: dict[str, Any] = {}
    """What is particular to the kind: tokens, seconds, reasons."""


OnEvent = Callable[[Event], None]


def in_words(event: Event) -> str:
    """What an event about engines, adapters and servers says, for people who wait for it."""
    data = dict(event.data)
    if event.kind == "preparing":
        return str(data["what"])
    words = event.kind.replace("_", " ")
    note = data.pop("note", "")
    if event.kind.startswith("engine_"):
        words = f"engine {data.pop('engine', '')} {event.kind.removeprefix('engine_')}"
        words += f" after {data.pop('seconds'):.1f} s" if "seconds" in data else ""
    words = " ".join([words, *(f"{key}={value}" for key, value in data.items())])
    return f"{words}: {note}" if note else words


class Listeners(list[OnEvent]):
    """Those who hear of events; false while there is nobody, so that no event need be put together.

    One that raises harms no run and no other listener. That is logged with its name and traceback, the first time.
    """

    def __init__(self, listeners: Iterable[OnEvent] = ()) -> None:
        super().__init__(listeners)
        self._raised: list[OnEvent] = []

    def __call__(self, event: Event) -> None:
        """Hand an event to everyone who listens."""
        for listen in self:
            try:
                listen(event)
            except Exception:
                if listen not in self._raised:
                    self._raised.append(listen)
                    _log.exception(
                        "the listener %s raised at event %r; runs go on, it is told of later events, "
                        "and this is not said again",
                        getattr(listen, "__qualname__", repr(listen)),
                        event.kind,
                    )


class RunEvents:
    """Sends the events of one run to the listeners; false when there are none."""

    def __init__(self, run_id: str, listeners: Listeners) -> None:
        self._run_id = run_id
        self._listeners = listeners

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def emit(self, kind: EventKind, path: str = "", role: str = "", **data: Any) -> None:
        """Something happened, to the run itself or to one of its steps."""
        if self._listeners:
            self._listeners(Event(kind=kind, run_id=self._run_id, step_path=path, role=role, data=data))
