"""Events of the server's runs for clients that watch: the last events, counters per role, adapters in slots."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ..events import Event, in_words
from ..settings.server import ServerSettings
from .error_replies import RequestRefused

__all__ = ["EventHub", "Numbered"]

Numbered = tuple[int, Event]

DECISIONS_KEPT = 50
RUN_ENDS = ("run_finished", "run_failed", "run_interrupted")
COUNTED = ("prompt_tokens", "cached_tokens", "thinking_tokens", "answer_tokens", "swaps")


class EventHub:
    """Listens to a session (`on_event`) and passes events on; a slow client delays no other."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._kept: deque[Numbered] = deque(maxlen=settings.events_kept)
        self._number = 0
        self._watchers: dict[MemoryObjectSendStream[Numbered], tuple[str | None, bool]] = {}
        self._closed = False
        self.roles: dict[str, dict[str, Any]] = {}
        self.slots: dict[str, list[str]] = {}
        self.running: dict[str, list[str]] = {}
        self.decisions: deque[dict[str, Any]] = deque(maxlen=DECISIONS_KEPT)
        self.last = ""

    def on_event(self, event: Event) -> None:
        """Take note of an event and pass it to those who watch."""
        if event.kind != "text":
            self._count(event)
            self._number += 1
            self._kept.append((self._number, event))
        for sender, (run_id, text) in list(self._watchers.items()):
            if (run_id is None or event.run_id == run_id) and (text or event.kind != "text"):
                try:
                    sender.send_nowait((self._number, event))
                except anyio.WouldBlock:  # it may come back and ask for what it has missed
                    self._let_go(sender)
                except anyio.BrokenResourceError:
                    self._let_go(sender)

    @asynccontextmanager
    async def watch(
        self, run_id: str | None = None, *, after: int | None = None, text: bool = False
    ) -> AsyncGenerator[MemoryObjectReceiveStream[Numbered]]:
        """Events of a run, or of all, from now on; with `after`, those that are kept behind that number come first.

        The stream ends when the server stops, or when its reader is too far behind. `text` is for pieces of text too.
        Raises: RequestRefused when too many watch already.
        """
        if len(self._watchers) >= self._settings.watchers:
            raise RequestRefused(
                f"{len(self._watchers)} clients watch already",
                status=429,
                code="too_many_watchers",
                retry_after_s=self._settings.retry_after_max_s,
                remedy="Close one, or raise server.watchers.",
            )
        missed = [] if after is None else [n for n in self._kept if n[0] > after and run_id in (None, n[1].run_id)]
        backlog = self._settings.watch_backlog + len(missed)
        sender, receiver = anyio.create_memory_object_stream[Numbered](backlog)
        for numbered in missed:
            sender.send_nowait(numbered)
        self._watchers[sender] = (run_id, text)
        if self._closed:
            self._let_go(sender)
        try:
            with receiver:
                yield receiver
        finally:
            self._let_go(sender)

    def close(self) -> None:
        """Tell everybody who watches that this was all."""
        self._closed = True
        for sender in list(self._watchers):
            self._let_go(sender)

    def _let_go(self, sender: MemoryObjectSendStream[Numbered]) -> None:
        self._watchers.pop(sender, None)
        sender.close()

    def _count(self, event: Event) -> None:
        match event.kind:
            case "run_started":
                self.running[event.run_id] = []
            case "run_finished" | "run_failed" | "run_interrupted":
                self.running.pop(event.run_id, None)
            case "step_started":
                self.running.setdefault(event.run_id, []).append(event.step_path)
            case "step_finished" | "step_failed":
                steps = self.running.get(event.run_id, [])
                if event.step_path in steps:
                    steps.remove(event.step_path)
            case "ask_retried":
                self._role(event)["retried"] += 1
            case "ask_finished":
                self._count_ask(event)
            case "adapter_loaded" | "adapter_evicted":
                self._count_slot(event)
            case "engine_ready":
                self.slots[str(event.data.get("engine", ""))] = []
                self._note(event)
            case "preparing" | "engine_starting" | "engine_restarted" | "server_lost" | "server_back":
                self._note(event)

    def _note(self, event: Event) -> None:
        self.last = in_words(event)

    def _count_ask(self, event: Event) -> None:
        role, data = self._role(event), event.data
        role["asks"] += 1
        role["variant"] = data.get("variant") or "base"
        role["seconds"] += data.get("seconds", 0.0)
        role["cpu_s"] += data.get("cpu_s", 0.0)
        for name in COUNTED:
            role[name] += data.get(name, 0)
        self.decisions.append(
            {
                "run": event.run_id,
                "step": event.step_path,
                "role": event.role,
                "variant": role["variant"],
                "reason": data.get("reason", ""),
                "seconds": data.get("seconds", 0.0),
            }
        )

    def _count_slot(self, event: Event) -> None:
        engine, adapter = str(event.data.get("engine", "")), str(event.data.get("adapter", ""))
        held = self.slots.setdefault(engine, [])
        if event.kind == "adapter_loaded" and adapter not in held:
            held.append(adapter)
        elif event.kind == "adapter_evicted" and adapter in held:
            held.remove(adapter)
        verb = "loaded into a slot" if event.kind == "adapter_loaded" else "evicted from its slot"
        self.decisions.append({"run": "", "step": "", "role": "", "variant": adapter, "reason": verb, "seconds": 0.0})

    def _role(self, event: Event) -> dict[str, Any]:
        fresh = {"variant": "", "asks": 0, "retried": 0, "seconds": 0.0, "cpu_s": 0.0} | dict.fromkeys(COUNTED, 0)
        return self.roles.setdefault(event.role, fresh)
