"""The live view counts what happens, on a terminal and off it."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from metier.runtime import Event
from metier.runtime.cli import live
from metier.runtime.cli.live import LiveView


def events() -> list[Event]:
    usage = {"variant": "solver-lora", "prompt_tokens": 40, "cached_tokens": 32, "answer_tokens": 5, "swaps": 1}
    step = {"run_id": "r", "step_path": "solver", "role": "solver"}
    return [
        Event(kind="engine_ready", data={"engine": "base", "seconds": 5.0}),
        Event(kind="run_started", run_id="r"),
        Event(kind="step_started", **step),  # type: ignore[arg-type]
        Event(kind="ask_finished", data=usage, **step),  # type: ignore[arg-type]
        Event(kind="ask_retried", **step),  # type: ignore[arg-type]
        Event(kind="step_finished", **step),  # type: ignore[arg-type]
        Event(kind="run_finished", run_id="r"),
        Event(kind="run_scored", run_id="r", data={"score": 1.0}),
    ]


def test_it_counts() -> None:
    view = LiveView("demo", 2, Console(file=io.StringIO()))
    for event in events():
        view.on_event(event)
    assert "demo: 1 of 2 runs ended, 1 solved, 0 asks running, 45 tokens, 1 swaps" in str(view.headline())
    solver = view.roles["solver"]
    assert (solver.variant, solver.done, solver.running, solver.retried) == ("solver-lora", 1, 0, 1)


def test_it_counts_calls_of_tools_apart() -> None:
    view = LiveView("demo", 2, Console(file=io.StringIO()))
    for at, data in enumerate(({"tool": "look"}, {"tool": "look", "error": "no"}, {"tool": "add"}), 1):
        call = {"run_id": "r", "step_path": f"solver/tool[{at}]"}
        view.on_event(Event(kind="step_started", **call, data={"tool": data["tool"]}))  # type: ignore[arg-type]
        view.on_event(Event(kind="step_finished", **call, data=data))  # type: ignore[arg-type]
    assert "0 tokens, 3 calls, 0 swaps" in str(view.headline())
    shown = Console(file=io.StringIO(), width=200, record=True)
    shown.print(view.render())
    assert "calls: look 2 (1 failed), add 1" in shown.export_text()


def test_off_a_terminal_it_prints_lines() -> None:
    file = io.StringIO()
    with LiveView("demo", 2, Console(file=file, width=200)) as view:
        for event in events():
            view.on_event(event)
    lines = file.getvalue().splitlines()
    assert lines[0] == "demo: engine base ready after 5.0 s"
    assert lines[-1].startswith("demo: 1 of 2 runs ended, 1 solved")


def test_off_a_terminal_no_line_is_broken() -> None:
    file = io.StringIO()
    with LiveView("a demo with a long name", 2, Console(file=file, width=40)) as view:
        view.on_event(Event(kind="engine_starting", data={"engine": "base", "note": "loads the model, " * 9}))
        for event in events():
            view.on_event(event)
    lines = file.getvalue().splitlines()
    assert all(line.startswith("a demo with a long name: ") for line in lines)
    assert lines[0].count("loads the model") == 9


def test_while_nothing_happens_it_says_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "WAITING_LINE_AFTER_S", 0.05)
    said = threading.Event()

    class Heard(io.StringIO):
        def write(self, text: str) -> int:
            if "s so far" in text:
                said.set()
            return super().write(text)

    file = Heard()
    with LiveView("demo", 2, Console(file=file, width=40)) as view:
        view.on_event(Event(kind="engine_starting", data={"engine": "base", "note": "compiles"}))
        assert said.wait(30)
    assert "s so far, engine base starting\n" in file.getvalue()


def test_on_a_terminal_it_draws_a_table() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    view = LiveView("demo", 2, console)
    for event in events():
        view.on_event(event)
    console.print(view.render())
    drawn = file.getvalue()
    for word in ("solver-lora", "cached", "engine base ready", "1 of 2"):
        assert word in drawn
