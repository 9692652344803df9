"""What runs right now: a live table on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..console import ERR
from ..events import Event, in_words

__all__ = ["LiveView"]

LINE_EVERY_S = 5.0
"""Least time between two lines of progress where there is no terminal."""

WAITING_LINE_AFTER_S = 15.0
"""After so long without a line one says what is still waited for."""

REFRESH_PER_SECOND = 4


@dataclass
class RoleCount:
    """What one role has done so far."""

    variant: str = ""
    running: int = 0
    done: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    thinking_tokens: int = 0
    answer_tokens: int = 0
    swaps: int = 0
    retried: int = 0
    climbed: int = 0


class LiveView:
    """Shows runs as they go: what runs, tokens, swaps, tasks solved. Pass `on_event` to a session.

    The number of runs is `total`; leave the `with` block to stop drawing.
    """

    def __init__(self, title: str, total: int, console: Console | None = None) -> None:
        self.title = title
        self.total = total
        self.roles: dict[str, RoleCount] = {}
        self.calls: dict[str, int] = {}
        self.failed_calls: dict[str, int] = {}
        self.active = self.ended = self.failed = self.solved = 0
        self.last = ""
        self._console = console or ERR
        self._began = time.monotonic()
        self._last_line = self._began - LINE_EVERY_S
        self._ended = threading.Event()
        self._waiting = threading.Thread(target=self._say_what_is_waited_for, daemon=True)
        self._running: dict[tuple[str, str], str] = {}
        self._live = Live(
            get_renderable=self.render, console=self._console, refresh_per_second=REFRESH_PER_SECOND, transient=True
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._waiting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._ended.set()
            self._waiting.join()
        self._say(str(self.headline()))

    def on_event(self, event: Event) -> None:
        """Take note of one event."""
        match event.kind:
            case "run_started":
                self.active += 1
            case "run_finished" | "run_failed" | "run_interrupted":
                self.active -= 1
                self.ended += 1
                self.failed += event.kind == "run_failed"
            case "run_scored":
                self.solved += event.data["score"] >= 1.0
            case "step_started" if event.role:
                self._role(event).running += 1
                self._running[event.run_id, event.step_path] = event.role
            case "step_finished" | "step_failed" if event.role:
                self._running.pop((event.run_id, event.step_path), None)
                self._role(event).running -= 1
                self._role(event).done += event.kind == "step_finished"
            case "step_finished" if "tool" in event.data:
                self._count_call(event.data["tool"], "error" in event.data)
            case "ask_finished":
                self._count_ask(event)
            case "ask_retried" if event.role:
                self._role(event).retried += 1
            case "preparing" | "engine_starting" | "engine_ready" | "engine_restarted" | "server_lost" | "server_back":
                self._note(event)
                if not self._console.is_terminal:
                    self._say(f"{self.title}: {self.last}")
            case "adapter_loaded" | "adapter_evicted":
                self._note(event)
            case _:
                return
        self._maybe_print_line()

    def _count_ask(self, event: Event) -> None:
        role, data = self._role(event), event.data
        role.variant = data.get("variant") or "base"
        role.prompt_tokens += data.get("prompt_tokens", 0)
        role.cached_tokens += data.get("cached_tokens", 0)
        role.thinking_tokens += data.get("thinking_tokens", 0)
        role.answer_tokens += data.get("answer_tokens", 0)
        role.swaps += data.get("swaps", 0)
        if data.get("climbs", 0):
            role.climbed += 1
            self.last = f"{event.role}: {data['reason']}"

    def _count_call(self, tool: str, failed: bool) -> None:
        self.calls[tool] = self.calls.get(tool, 0) + 1
        self.failed_calls[tool] = self.failed_calls.get(tool, 0) + failed

    def _note(self, event: Event) -> None:
        self.last = in_words(event)

    def _role(self, event: Event) -> RoleCount:
        return self.roles.setdefault(event.role, RoleCount())

    def _maybe_print_line(self) -> None:
        if not self._console.is_terminal and time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._say(str(self.headline()))

    def _say(self, line: str) -> None:
        """One line, never broken: a reader of a pipe has no width."""
        self._last_line = time.monotonic()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _say_what_is_waited_for(self) -> None:
        """In a thread of its own, since what is waited for may hold the loop: an engine that starts, a long answer."""
        while not self._ended.wait(max(self._last_line + WAITING_LINE_AFTER_S - time.monotonic(), 0.1)):
            if time.monotonic() - self._last_line >= WAITING_LINE_AFTER_S:
                waited = f"{time.monotonic() - self._began:.0f} s so far, {self.last.partition(': ')[0]}"
                self._say(str(self.headline()) if self.active else f"{self.title}: {waited}")

    def headline(self) -> Text:
        """One line: runs ended and solved, asks running, tokens so far, seconds."""
        running = sum(role.running for role in self.roles.values())
        tokens = sum(r.prompt_tokens + r.thinking_tokens + r.answer_tokens for r in self.roles.values())
        calls = f"{sum(self.calls.values())} calls, " if self.calls else ""
        swaps = sum(role.swaps for role in self.roles.values())
        failed = f", {self.failed} failed" if self.failed else ""
        return Text(
            f"{self.title}: {self.ended} of {self.total} runs ended{failed}, {self.solved} solved, "
            f"{running} asks running, {tokens} tokens, {calls}{swaps} swaps, {time.monotonic() - self._began:.0f} s"
        )

    def render(self) -> Group:
        """The table of roles under the headline, and the engine's last word."""
        table = Table(box=None, pad_edge=False)
        numbers = ("running", "done", "prompt", "cached", "thought", "written", "swaps", "retried", "climbed")
        for head in ("role", "variant", *numbers):
            table.add_column(head, justify="left" if head in ("role", "variant") else "right")
        for name, r in self.roles.items():
            tokens = (r.prompt_tokens, r.cached_tokens, r.thinking_tokens, r.answer_tokens)
            table.add_row(name, r.variant, *map(str, (r.running, r.done, *tokens, r.swaps, r.retried, r.climbed)))
        failed = {tool: f" ({times} failed)" for tool, times in self.failed_calls.items() if times}
        shown = [f"{tool} {times}{failed.get(tool, '')}" for tool, times in self.calls.items()]
        calls = [Text(f"calls: {', '.join(shown)}")] if shown else []
        return Group(self.headline(), table, *calls, Text(self.last, style="dim"))
