"""What `metier run`, `resume` and `report` do: one batch of a workflow file, with a live view and a report."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ...agents.errors import ResumeError, RunError, RunInterrupted, RunTakenError, SettingsError
from ...agents.graphs.nodes import BuiltGraph
from ...agents.graphs.workflow_file import WorkflowFile, load_workflow
from ...agents.tasksets import TaskSet
from ...agents.traffic import write_traffic
from ...router.assignment import Assignment, load_assignment
from ...specializers.shelf.bundled_model import DEFAULT_BASE
from ..backends import DEFAULT_ENGINE, EngineName
from ..console import say, show_markdown
from ..opening import open_session
from ..output_files import write_output, writing
from ..report import render_report
from ..runs.run_plan import RunResult
from ..runs.session import Session
from ..settings.limits import RunLimits
from ..settings.session import load_settings
from ..store.commands import command
from ..store.records import BatchRecord
from ..store.store import RunStore
from .ending import when_stopped
from .live import LiveView
from .options import absolute, open_store

__all__ = ["RunOptions", "export", "list_batches", "resume_run", "run_workflow"]


class RunOptions(BaseModel):
    """What a batch was started with; kept in the store, so that `metier resume` needs nothing else."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    workflow: str
    """`file.py` or `file.py:name` of the task graph."""
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


async def run_workflow(options: RunOptions, store: Path, report: Path | None, export_traffic: Path | None) -> None:
    """Start a batch, watch it, print and write its report; raises what its only run raised."""
    file = load_workflow(options.workflow)
    inputs = _inputs(file, options)
    options = options.model_copy(update={"workflow": absolute(options.workflow), "assignment": _read(options)})
    with RunStore(store) as runs:
        async with _watched(options, runs, file, len(inputs)) as session:
            when_stopped(lambda: _how_to_go_on(runs, session.batch))
            results = await session.map(
                file.graph,
                inputs,
                concurrency=options.concurrency,
                seed=options.seed,
                limits=options.limits(),
                options=options.model_dump(mode="json"),
            )
            batch = session.batch
        assert batch is not None
        _finish(runs, batch, results, report, export_traffic)


def export(runs: RunStore, batches: list[str], path: Path) -> None:
    """Write what batches asked and were answered; raises SettingsError when the file cannot be written."""
    with writing(path):
        count = write_traffic(path, (row for batch in batches for row in runs.traffic(batch)))
    say(f"wrote {count} asks to {path}")


async def resume_run(
    which: str | None,
    answer: Any,
    at: str | None,
    limits: dict[str, Any],
    store: Path,
    report: Path | None,
    export_traffic: Path | None,
) -> None:
    """Go on with a batch, or with one run; see `metier resume --help`."""
    with open_store(store) as runs:
        batch, run_id = _find(runs, which)
        raised = {name: value for name, value in limits.items() if value is not None}
        options = RunOptions.model_validate(batch.options).model_copy(update=raised)
        if not options.workflow:
            raise ResumeError(
                f"batch {batch.id} was not started by `metier run`",
                remedy="Resume it from Python: session.resume(graph, run_id).",
            )
        file = load_workflow(options.workflow)
        tasks = file.tasks(options.tasks) if options.tasks else None
        answers = _answers(runs, run_id, answer, at) if answer is not None else {}
        open_runs = [run for run in runs.runs(batch.id) if run.state != "finished"]
        if not open_runs:
            see = command("report", batch.id, store=runs.path)
            raise ResumeError(f"every run of batch {batch.id} is finished", remedy=f"See it: {see}")
        when_stopped(lambda: _how_to_go_on(runs, batch.id))
        async with _watched(options, runs, file, len(open_runs)) as session:
            if answers:
                assert run_id is not None
                results = [RunResult(run_id, await session.resume(file.graph, run_id, answers=answers))]
            else:
                results = await session.resume_batch(
                    file.graph, batch.id, tasks, concurrency=options.concurrency, limits=options.limits()
                )
        _finish(runs, batch.id, results, report, export_traffic)


def _how_to_go_on(runs: RunStore, batch: str | None) -> str:
    if batch is None:
        return "Nothing was started yet."
    return f"What was recorded is kept; go on: {command('resume', batch, store=runs.path)}"


def list_batches(store: Path) -> None:
    """Print a line for each batch, oldest first."""
    with open_store(store) as runs:
        for batch in runs.batches():
            states = [run.state for run in runs.runs(batch.id)]
            sys.stdout.write(f"{batch.id}\t{states.count('finished')} of {len(states)} finished\n")


@asynccontextmanager
async def _watched(options: RunOptions, store: RunStore, file: WorkflowFile, total: int) -> AsyncGenerator[Session]:
    """A session opened from a batch's options, with the live view on."""
    given = options.assignment
    assignment = Assignment.model_validate(given) if isinstance(given, dict) else given
    if isinstance(assignment, Assignment):
        assignment.check_roles(file.graph.roles())  # before an engine takes its time to start
    settings = load_settings(Path(options.settings) if options.settings else None, options.overrides)
    with LiveView(file.graph.name, total) as view:
        async with open_session(
            base=options.base,
            assignment=assignment,
            engine=options.engine,
            shelf=options.shelf,
            store=store,
            settings=settings,
            on_event=view.on_event,
            scripted=file.scripted,
        ) as session:
            yield session


def _inputs(file: WorkflowFile, options: RunOptions) -> TaskSet | list[BaseModel]:
    if (options.tasks is None) == (options.input is None):
        raise SettingsError("neither or both of --tasks and --input", expected="one", remedy="Try --tasks test:8.")
    if options.tasks is not None:
        return file.tasks(options.tasks)
    return [parse_input(file.graph, options.input or "")]


def parse_input(graph: BuiltGraph, text: str) -> BaseModel:
    """One input of a workflow from JSON; raises SettingsError that shows the fields it has."""
    try:
        return graph.takes.model_validate_json(text)
    except ValidationError as error:
        fields = ", ".join(f'"{name}": …' for name in graph.takes.model_fields)
        first = error.errors()[0]
        raise SettingsError(f"--input {text!r}: {first['msg']}", expected=f"{{{fields}}}") from error


def _read(options: RunOptions) -> dict[str, Any] | None:
    """The assignment's content rather than its path: a batch goes on with what it was started with."""
    if options.assignment is None or isinstance(options.assignment, dict):
        return options.assignment
    return load_assignment(options.assignment).model_dump(mode="json", exclude_defaults=True)


def _find(runs: RunStore, which: str | None) -> tuple[BatchRecord, str | None]:
    if which is None:
        for batch in reversed(runs.batches()):
            if any(run.state != "finished" for run in runs.runs(batch.id)):
                return batch, None
        see = command("report", store=runs.path)
        raise ResumeError(f"every run in {runs.path} is finished", remedy=f"See the newest: {see}")
    if any(batch.id == which for batch in runs.batches()):
        return runs.batch(which), None
    run = runs.run(which)
    return runs.batch(run.batch), run.id


def _answers(runs: RunStore, run_id: str | None, answer: Any, at: str | None) -> dict[str, Any]:
    if run_id is None:
        raise ResumeError("an answer needs a run", expected="metier resume RUN --answer …")
    waiting = [path for path, (_, given) in runs.questions(run_id).items() if given is None]
    if at is None and len(waiting) != 1:
        raise ResumeError(
            f"run {run_id} has {len(waiting)} open questions",
            expected="one" if waiting else "a run that waits for a person",
            remedy=f"Name its step: --at with one of {', '.join(waiting)}." if waiting else "",
        )
    return {at or waiting[0]: answer}


def _finish(
    runs: RunStore, batch: str, results: list[RunResult], report: Path | None, export_traffic: Path | None
) -> None:
    text = render_report(runs, [batch])
    show_markdown(text)
    if report is not None:
        write_output(report, text)
    if export_traffic is not None:
        export(runs, [batch], export_traffic)
    waiting = [r.error for r in results if isinstance(r.error, RunInterrupted)]
    if waiting:
        raise waiting[0]
    resume = command("resume", batch, store=runs.path)
    taken = [r.error for r in results if isinstance(r.error, RunTakenError)]
    failed = [r.error for r in results if r.error is not None and r.error not in taken]
    if taken:
        say(
            f"{len(taken)} of {len(results)} runs are under way in another process, which records how they end. "
            f"Should it be stopped: {resume}"
        )
    if failed and len(failed) == len(results):
        say(f"To go on, once what stopped it is mended: {resume}")
        raise failed[0]
    if len(results) == 1 and results[0].output is not None:
        output = results[0].output
        say(f"output: {output.model_dump_json() if isinstance(output, BaseModel) else output}")
    elif failed:
        raise RunError(
            f"{len(failed)} of {len(results)} runs failed; the first: {failed[0].problem}",
            remedy=f"Mend what it says, then go on: {resume}",
        )
    elif taken:
        raise taken[0]
