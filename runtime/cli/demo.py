"""The demo: fresh puzzles, three roles on three variants of one small model, and the bare base beside it."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path

from ...agents.errors import SettingsError
from ...agents.graphs.workflow_file import WorkflowFile, load_workflow
from ...agents.tasksets import TaskSet
from ...router.assignment import Assignment, load_assignment
from ..console import say, show_markdown
from ..events import Event
from ..opening import open_session
from ..output_files import write_output
from ..report import render_report
from ..settings.session import Settings
from ..store.commands import command
from ..store.store import RunStore
from .ending import when_stopped
from .live import LiveView

__all__ = ["PACKAGE", "demo_folder", "run_demo"]

PACKAGE = "metier.examples"


def demo_folder() -> Path:
    """Where the demo's workflow, recipes, assignment and adapters lie: in a checkout, or where a wheel was installed.

    Raises: SettingsError when this installation lacks them.
    """
    try:
        folder = Path(str(files(PACKAGE)))
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"the demo's files are not there: {error}",
            expected=f"the package {PACKAGE}, which comes with metier",
            remedy="Install anew: `make install` in a checkout, or pip install --force-reinstall --no-deps the wheel.",
        ) from error
    return folder


async def run_demo(tasks: int, skip_base: bool, engine: str, store: Path, report: Path, settings: Settings) -> None:
    """Run the demo and write its report; see `metier demo --help`.

    Raises: SettingsError when its files are not there, and whatever opening a session raises.
    """
    began = time.monotonic()
    folder = demo_folder()
    file = load_workflow(str(folder / "solve_and_check.py"))
    puzzles = file.tasks(f"test:{tasks}")
    say(f"{len(puzzles)} puzzles from seeds {puzzles.seeds[0]}.. of the test split, none seen in training.")
    say(f"Workflow, recipes and adapters: {folder}")
    specialised = load_assignment(folder / "assignment.yaml")
    shelf = folder / "variants"
    with RunStore(store) as runs:
        when_stopped(lambda: _when_stopped(runs))
        batches = [await _run(file, puzzles, specialised, "three variants", engine, shelf, runs, settings, began)]
        if not skip_base:
            batches.append(await _run(file, puzzles, Assignment(), "bare base", engine, shelf, runs, settings, None))
        text = render_report(runs, batches)
    show_markdown(text)
    write_output(report, text)
    say(f"Runs are in {store}: {command('report', *batches, store=str(store))}")
    say(f"That took {time.monotonic() - began:.0f} s in all.")


def _when_stopped(runs: RunStore) -> str:
    if not runs.batches():
        return "Nothing was started yet."
    return f"The next demo starts anew; what this one recorded: {command('report', store=runs.path)}"


async def _run(
    file: WorkflowFile,
    puzzles: TaskSet,
    assignment: Assignment,
    label: str,
    engine: str,
    shelf: Path,
    runs: RunStore,
    settings: Settings,
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
            assignment=assignment,
            shelf=[shelf],
            engine=engine,
            store=runs,
            settings=settings,
            on_event=watch,
            scripted=file.scripted,
        ) as session:
            await session.map(file.graph, puzzles, label=label)
            assert session.batch is not None
            return session.batch
