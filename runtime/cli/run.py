"""`metier run`: one batch of a workflow file, with a live view, its answers and a report."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ...agents.backend import ScriptedBackend
from ...agents.errors import SettingsError
from ...agents.graphs.nodes import BuiltGraph
from ...agents.graphs.workflow_file import WorkflowFile, load_workflow
from ...agents.tasksets import TaskSet
from ...agents.text_files import MOST_JSON_MIB, UnreadableTextError, parse_json, read_bounded, shown
from ...router.assignment import Assignment, load_assignment
from ...specializers.shelf.bundled_model import DEFAULT_BASE
from ..backends import DEFAULT_ENGINE, EngineName
from ..opening import open_session
from ..runs.session import Session
from ..settings.limits import RunLimits
from ..settings.session import load_settings
from ..store.commands import command
from ..store.store import RunStore
from .ending import when_stopped
from .live import LiveView
from .options import (
    DEFAULT_STORE,
    AnswersAsJson,
    AnswersFile,
    AssignmentFile,
    Base,
    Concurrency,
    Engine,
    MaxSeconds,
    MaxTokens,
    ReportFile,
    Seed,
    Sets,
    SettingsFile,
    Shelf,
    Store,
    Tasks,
    TrafficFile,
    Workflow,
    absolute,
    checked,
    overrides,
)
from .outcome import Outlet, finish

__all__ = ["RunOptions", "add_run_command", "how_to_go_on", "run_workflow", "watched"]

STDIN = "-"


class RunOptions(BaseModel):
    """What a batch was started with; kept in the store, so that `metier resume` needs nothing else."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    workflow: str = ""
    """`file.py` or `file.py:name` of the task graph. Empty where a batch was started from Python, and none is known."""
    tasks: str | None = None
    """Tasks of the file as `split:size[:seed]`; None for a single `input`."""
    input: str | None = None
    """Input of a single run, as JSON or text; None for a task set."""
    assignment: str | dict[str, Any] | None = None
    """Assignment: a file's path before it is read, its content after; None: the base plays every role."""
    base: str = DEFAULT_BASE
    """Base model: a bundled name, a folder or a Hugging Face id."""
    # Stores hold batches from when folders of variants were called `variants`.
    shelf: list[str] = Field(default=[], validation_alias=AliasChoices("shelf", "variants"))
    """Folders of variants beside the user's own shelf."""
    engine: EngineName = DEFAULT_ENGINE
    """Which engine answers: its name, or a server's URL."""
    backend: str | None = None
    """Class of the backend of its own that a batch from Python was run on; None for an engine."""
    concurrency: int | None = None
    """Runs at a time; None: as the settings say."""
    max_tokens: int | None = None
    """Most tokens of one run. None: as the settings say."""
    max_seconds: float | None = None
    """Longest time of one run in seconds. None: as the settings say."""
    seed: int = 0
    """Seed of sampling."""
    settings: str | None = None
    """Settings file, None for the defaults."""
    overrides: dict[str, Any] = {}
    """Single settings over that file, by name."""

    def limits(self) -> RunLimits:
        """The limits of one run; raises SettingsError when they are out of range."""
        try:
            return RunLimits(max_tokens=self.max_tokens, max_seconds_s=self.max_seconds)
        except ValidationError as error:
            raise SettingsError(f"limits: {error.errors()[0]['msg']}", expected="numbers above 0") from error


def add_run_command(app: typer.Typer) -> None:
    """Add `run` to the command line."""
    app.command(
        epilog="Example: `metier run examples/solve_and_check.py --tasks test:24 "
        "--assignment examples/assignment.yaml --shelf examples/variants`, or "
        "`metier run examples/solve_and_check.py --input @puzzle.json --json`"
    )(run)


def run(
    workflow: Workflow,
    tasks: Tasks = None,
    input: Annotated[
        str | None, typer.Option(help="One input instead of tasks: JSON, @FILE that holds it, or - for stdin.")
    ] = None,
    json: AnswersAsJson = False,
    output: AnswersFile = None,
    label: Annotated[str | None, typer.Option(help="Name of this batch in reports.")] = None,
    assignment: AssignmentFile = None,
    base: Base = DEFAULT_BASE,
    shelf: Shelf = None,
    engine: Engine = DEFAULT_ENGINE,
    concurrency: Concurrency = None,
    max_tokens: MaxTokens = None,
    max_seconds: MaxSeconds = None,
    seed: Seed = 0,
    store: Store = DEFAULT_STORE,
    report: ReportFile = None,
    export_traffic: TrafficFile = None,
    settings: SettingsFile = None,
    set: Sets = None,
) -> None:
    """Run a workflow on tasks or on one input and record everything; print the report of tasks, the answer of an input.

    Answers and reports go to stdout, what goes on meanwhile to stderr.
    """
    options = checked(
        RunOptions,
        workflow=workflow,
        tasks=tasks,
        input=None if input is None else read_input(input),
        assignment=None if assignment is None else str(assignment),
        base=base,
        shelf=[str(folder) for folder in shelf or ()],
        engine=engine,
        concurrency=concurrency,
        max_tokens=max_tokens,
        max_seconds=max_seconds,
        seed=seed,
        settings=None if settings is None else str(settings),
        overrides=overrides(set),
    )
    outlet = Outlet(report, export_traffic, json, output)
    anyio.run(run_workflow, options, store, outlet, label or "")


async def run_workflow(options: RunOptions, store: Path, outlet: Outlet | None = None, label: str = "") -> None:
    """Start a batch, watch it, tell and write what comes of it; raises what its only run raised."""
    file = load_workflow(options.workflow)
    inputs = _inputs(file, options)
    options = options.model_copy(update={"workflow": absolute(options.workflow), "assignment": _read(options)})
    with RunStore(store) as runs:
        async with watched(options, runs, file, len(inputs)) as session:
            when_stopped(lambda: how_to_go_on(runs, session.batch))
            results = await session.map(
                file.graph,
                inputs,
                concurrency=options.concurrency,
                seed=options.seed,
                limits=options.limits(),
                label=label,
                options=options.model_dump(mode="json"),
            )
            batch = session.batch
        assert batch is not None
        finish(runs, batch, results, replace(outlet or Outlet(), alone=options.tasks is None))


def how_to_go_on(runs: RunStore, batch: str | None) -> str:
    """What is kept of a batch that is stopped, and the command that goes on with it."""
    if batch is None:
        return "Nothing was started yet."
    return f"What was recorded is kept; go on: {command('resume', batch, store=runs.path)}"


@asynccontextmanager
async def watched(options: RunOptions, store: RunStore, file: WorkflowFile, total: int) -> AsyncGenerator[Session]:
    """A session opened from a batch's options, with the live view on. Where no role asks, no engine is opened."""
    given = options.assignment
    assignment = Assignment.model_validate(given) if isinstance(given, dict) else given
    if isinstance(assignment, Assignment):
        assignment.check_roles(file.graph.roles())  # before an engine takes its time to start
    settings = load_settings(Path(options.settings) if options.settings else None, options.overrides)
    with LiveView(file.graph.name, total) as view:
        async with open_session(
            base=options.base,
            assignment=assignment,
            backend=None if file.graph.roles() else ScriptedBackend(),
            engine=options.engine,
            shelf=options.shelf,
            store=store,
            settings=settings,
            on_event=view.on_event,
            scripted=file.scripted,
        ) as session:
            yield session


def read_input(given: str) -> str:
    """The text of an input: what was typed, the file of `@FILE`, or what comes on stdin for `-`.

    Raises: SettingsError when there is no such file, or it is no text.
    """
    try:
        if given.startswith("@"):
            return read_bounded(Path(given[1:]))
        if given == STDIN:
            data = sys.stdin.buffer.read(MOST_JSON_MIB * 2**20 + 1)
            if len(data) > MOST_JSON_MIB * 2**20:
                raise UnreadableTextError(f"it is larger than {MOST_JSON_MIB} MiB")
            return data.decode()
    except (UnreadableTextError, UnicodeDecodeError, FileNotFoundError) as error:
        problem = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise SettingsError(
            f"--input {shown(given)} cannot be read: {problem}", expected="JSON, @FILE that holds it, or - for stdin"
        ) from error
    return given


def parse_input(graph: BuiltGraph, text: str) -> BaseModel:
    """One input of a workflow from JSON; raises SettingsError that shows the fields it has."""
    fields = ", ".join(f'"{name}": …' for name in graph.takes.model_fields)
    expected = f"{{{fields}}}"
    try:
        parse_json(text)
        return graph.takes.model_validate_json(text)
    except UnreadableTextError as error:
        raise SettingsError(f"--input {shown(text)}: {error}", expected=expected) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        told = f"{where}: {first['msg']}" if where else first["msg"]
        raise SettingsError(f"--input {shown(text)}: {told}", expected=expected) from error


def _inputs(file: WorkflowFile, options: RunOptions) -> TaskSet | list[BaseModel]:
    if (options.tasks is None) == (options.input is None):
        raise SettingsError("neither or both of --tasks and --input", expected="one", remedy="Try --tasks test:8.")
    if options.tasks is not None:
        return file.tasks(options.tasks)
    return [parse_input(file.graph, options.input or "")]


def _read(options: RunOptions) -> dict[str, Any] | None:
    """The assignment's content rather than its path: a batch goes on with what it was started with."""
    if options.assignment is None or isinstance(options.assignment, dict):
        return options.assignment
    return load_assignment(options.assignment).model_dump(mode="json", exclude_defaults=True)
