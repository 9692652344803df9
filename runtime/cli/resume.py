"""`metier resume` and `metier questions`: go on with runs that stopped, and answer what they ask people."""

from __future__ import annotations

import json as json_text
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from rich.table import Table
from rich.text import Text

from ...agents.errors import ResumeError
from ...agents.graphs.workflow_file import WorkflowFile, load_workflow
from ..backends import SCRIPTED, check_engine
from ..console import say, show
from ..runs.batches import goes_on_with, how_to_answer, take_answers
from ..runs.run_plan import RunResult
from ..store.commands import command
from ..store.records import CONVERSATION, BatchRecord
from ..store.store import RunStore
from .ending import when_stopped
from .options import (
    DEFAULT_STORE,
    AnswersAsJson,
    AnswersFile,
    AsJson,
    MaxSeconds,
    MaxTokens,
    OtherEngine,
    ReportFile,
    Store,
    TrafficFile,
    absolute,
    open_store,
    read_json,
    stored_runs,
)
from .outcome import Outlet, finish
from .run import RunOptions, how_to_go_on, watched

__all__ = ["add_resume_commands", "on_engine"]


def add_resume_commands(app: typer.Typer) -> None:
    """Add `resume` and `questions` to the command line."""
    app.command(epilog="Example: `metier resume`, or `metier resume RUN --answer '{\"correct\": true}'`")(resume)
    app.command(epilog="Example: `metier questions`")(questions)


def resume(
    which: Annotated[str | None, typer.Argument(help="Run or batch; the newest unfinished batch by default.")] = None,
    answer: Annotated[str | None, typer.Option(help="A person's answer as JSON, for the run that waits.")] = None,
    at: Annotated[str | None, typer.Option(help="Step that the answer is for, when several wait.")] = None,
    json: AnswersAsJson = False,
    output: AnswersFile = None,
    workflow: Annotated[
        str | None, typer.Option(help="file.py, or file.py:name, of runs that Python started without a file known.")
    ] = None,
    engine: OtherEngine = None,
    max_tokens: MaxTokens = None,
    max_seconds: MaxSeconds = None,
    store: Store = DEFAULT_STORE,
    report: ReportFile = None,
    export_traffic: TrafficFile = None,
) -> None:
    """Go on with runs that were killed, stopped, failed, or wait for a person; nothing recorded runs again.

    What answers is what did before; `--engine` names another, as a run needs that was on a backend of its own.
    """
    given = None if answer is None else read_json(answer, "--answer")
    changed = {
        "max_tokens": max_tokens,
        "max_seconds": max_seconds,
        "workflow": None if workflow is None else absolute(workflow),
        "engine": None if engine is None else check_engine(engine),
    }
    anyio.run(resume_run, which, given, at, changed, store, Outlet(report, export_traffic, json, output))


async def resume_run(
    which: str | None, answer: Any, at: str | None, changed: dict[str, Any], store: Path, outlet: Outlet
) -> None:
    """Go on with a batch, or with one run; `changed` are options that replace those it was started with."""
    with open_store(store) as runs:
        batch, run_id = _find(runs, which)
        if CONVERSATION in batch.options:
            raise ResumeError(
                f"{batch.id} is a conversation",
                expected="a batch or a run",
                remedy=f"Go on: {goes_on_with(runs, batch)}",
            )
        changed = {name: value for name, value in changed.items() if value is not None}
        options = RunOptions.model_validate({**batch.options, **changed})
        if not options.workflow:
            how = command("resume", which or batch.id, "--workflow", "FILE.py", store=runs.path)
            raise ResumeError(
                f"batch {batch.id} was started from Python, and the file of its workflow is not known",
                expected="its name",
                remedy=f"Name it: {how}, or go on in Python with session.resume(graph, run_id).",
            )
        file = load_workflow(options.workflow)
        options = on_engine(options, file, named="engine" in changed)
        tasks = file.tasks(options.tasks) if options.tasks else None
        if answer is not None:  # first: a misfit is said before an engine takes its time to start
            take_answers(runs, file.graph, run_id or "", _answers(runs, run_id, answer, at))
        open_runs = [run for run in runs.runs(batch.id) if run.state != "finished"]
        if not open_runs:
            see = command("report", batch.id, store=runs.path)
            raise ResumeError(f"every run of batch {batch.id} is finished", remedy=f"See it: {see}")
        when_stopped(lambda: how_to_go_on(runs, batch.id))
        async with watched(options, runs, file, len(open_runs)) as session:
            if answer is not None:
                assert run_id is not None
                results = [RunResult(run_id, await session.resume(file.graph, run_id))]
            else:
                results = await session.resume_batch(
                    file.graph, batch.id, tasks, concurrency=options.concurrency, limits=options.limits()
                )
        finish(runs, batch.id, results, replace(outlet, alone=len(results) == 1 and options.tasks is None))


def on_engine(options: RunOptions, file: WorkflowFile, named: bool) -> RunOptions:
    """The options with what answers; raises ResumeError for a backend that only the program has that started it."""
    if options.backend is None or named or not file.graph.roles():
        return options
    if options.backend == "ScriptedBackend" and file.has_scripted:
        return options.model_copy(update={"engine": SCRIPTED})
    raise ResumeError(
        f"it was started on a backend of its own, {options.backend}",
        expected="the name of an engine",
        remedy="Name one with --engine, or go on in Python with session.resume(graph, run_id).",
    )


def _find(runs: RunStore, which: str | None) -> tuple[BatchRecord, str | None]:
    if which is None:
        talk: BatchRecord | None = None
        for batch in reversed(runs.batches()):
            states = [run.state for run in runs.runs(batch.id)]
            if CONVERSATION not in batch.options:
                if any(state != "finished" for state in states):
                    return batch, None
            elif talk is None and states and states[-1] != "finished":  # only its last turn can be gone on with
                talk = batch
        if talk is not None:
            raise ResumeError(
                f"what is not finished in {runs.path} is the last turn of conversation {talk.id}",
                expected="a batch or a run",
                remedy=f"Go on: {goes_on_with(runs, talk)}",
            )
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


def questions(store: Store = DEFAULT_STORE, json: AsJson = False) -> None:
    """List what waits for a person: run, step, question, the shape of the answer, since when; and how to answer it."""
    with stored_runs(store) as runs:
        waiting = runs.open_questions()
        if json:
            sys.stdout.write(json_text.dumps([asdict(one) for one in waiting], ensure_ascii=False) + "\n")
            return
        if not waiting:
            say(f"Nothing in {store} waits for a person.")
            return
        table = Table(box=None, pad_edge=False)
        for head in ("run", "step", "question", "answer", "since"):
            table.add_column(head, overflow="fold")
        for one in waiting:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.asked_at)) if one.asked_at else "–"
            table.add_row(*map(Text, (one.run, one.path, one.question, one.gives or "–", since)))
        show(table)
        first = waiting[0]
        say(f"Answer with: {how_to_answer(runs, first.run, first.path)}")
