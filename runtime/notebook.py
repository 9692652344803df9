"""What notebooks need: whether this is one, and progress that is one output, drawn anew in place."""

from __future__ import annotations

import sys
import time
from html import escape
from importlib import import_module
from typing import Any

from .events import STARTUP, Event, in_words

__all__ = ["NotebookProgress", "in_notebook"]

REFRESH_S = 0.5
"""Least time between two drawings of one output."""

MOST_NOTE_CHARACTERS = 300
"""Characters of the engine's last word."""


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel: its cells run while its event loop does."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class NotebookProgress:
    """Shows what runs below the cell that started it: one output, drawn at most twice a second. Listens to a session.

    An output ends when nothing runs any more; what starts after that gets an output of its own, below its own cell.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn_at = 0.0
        self._begin()

    def _begin(self) -> None:
        self.active = self.ended = self.failed = self.waiting = self.scored = self.solved = self.asks = self.tokens = 0
        self.note = ""
        self._began = time.monotonic()

    def on_event(self, event: Event) -> None:
        """Take note of one event, and draw."""
        if self._handle is None:
            self._begin()
        match event.kind:
            case "run_started":
                self.active += 1
            case "run_finished" | "run_failed" | "run_interrupted":
                self.active -= 1
                self.ended += 1
                self.failed += event.kind == "run_failed"
                self.waiting += event.kind == "run_interrupted"
            case "run_scored":
                self.scored += 1
                self.solved += event.data["score"] >= 1.0
            case "ask_finished":
                self.asks += 1
                counted = ("prompt_tokens", "thinking_tokens", "answer_tokens")
                self.tokens += sum(event.data.get(name, 0) for name in counted)
            case "server_lost" | "server_back":
                self.note = in_words(event)
            case kind if kind in STARTUP:
                self.note = in_words(event)
            case _:
                return
        over = not self.active and event.kind in ("run_finished", "run_failed", "run_interrupted", "engine_ready")
        if over or time.monotonic() - self._drawn_at >= REFRESH_S:
            self._draw()
        if over:
            self._handle = None

    def line(self) -> str:
        """What runs, in a line."""
        counts = [f"{self.ended} of {self.ended + self.active} runs ended"]
        counts += [f"{self.failed} failed"] if self.failed else []
        counts += [f"{self.waiting} waiting for a person"] if self.waiting else []
        counts += [f"{self.solved} of {self.scored} solved"] if self.scored else []
        counts += [f"{self.asks} asks", f"{self.tokens} tokens", f"{time.monotonic() - self._began:.0f} s"]
        ran = self.active or self.ended
        return "; ".join([*([", ".join(counts)] if ran else []), *([self.note] if self.note else [])])

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        line = self.line()
        shown = {"text/plain": line, "text/html": f"<pre>{escape(line[:MOST_NOTE_CHARACTERS])}</pre>"}
        if self._handle is None:
            display = import_module("IPython.display").display
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)
