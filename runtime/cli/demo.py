"""The demo: fresh puzzles, three roles on three variants of one small model, and the bare base beside it."""

from __future__ import annotations

import time
from pathlib import Path

from ...agents.errors import SettingsError
from ...agents.tasksets import TaskSet
from ...agents.workflow_file import WorkflowFile, load_workflow
from ...router.assignment import Assignment, load_assignment
from ..console import say, show_markdown
from ..events import Event
from ..opening import open_session
from ..report import render_report
from ..store.store import RunStore
from .live import LiveView

__all__ = ["run_demo"]

EXAMPLES = Path(__file__).parents[1] / "examples"


async def run_demo(tasks: int, skip_base: bool, engine: str, store: Path, report: Path) -> None:
    """Run the demo and write its report; see `metier demo --help`.

    Raises: SettingsError when the examples are not there, and whatever opening a session raises.
    """
    began = time.monotonic()
    if not (EXAMPLES / "solve_and_check.py").is_file():  # noqa: ASYNC240
        raise SettingsError(
            f"no examples at {EXAMPLES}",
            expected="a checkout of the repository",
            remedy="Run `make demo` in it; an installed wheel has no examples.",
        )
    file = load_workflow(str(EXAMPLES / "solve_and_check.py"))
    puzzles = file.tasks(f"test:{tasks}")
    say(f"{len(puzzles)} puzzles from seeds {puzzles.seeds[0]}.. of the test split, none seen in training.")
    specialised = load_assignment(EXAMPLES / "assignment.yaml")
    with RunStore(store) as runs:
        batches = [await _run(file, puzzles, specialised, "three variants", engine, runs, began)]
        if not skip_base:
            batches.append(await _run(file, puzzles, Assignment(), "bare base", engine, runs, None))
        text = render_report(runs, batches)
    report.write_text(text, encoding="utf-8")  # noqa: ASYNC240
    show_markdown(text)
    say(f"Report written to {report}; runs are in {store} (metier report --store {store}).")


async def _run(
    file: WorkflowFile,
    puzzles: TaskSet,
    assignment: Assignment,
    label: str,
    engine: str,
    runs: RunStore,
    began: float | None,
) -> str:
    view = LiveView(label, len(puzzles))
    shown = False

    def watch(event: Event) -> None:
        nonlocal shown
        view.on_event(event)
        if began is not None and not shown and event.kind == "run_finished":
            shown = True
            say(f"first answer after {time.monotonic() - began:.1f} s: {event.data['output']}")

    with view:
        async with open_session(
            scripted=file.scripted,
            assignment=assignment,
            shelf=[EXAMPLES / "variants"],
            engine=engine,
            store=runs,
            on_event=watch,
        ) as session:
            await session.map(file.graph, puzzles, label=label)
            assert session.batch is not None
            return session.batch
