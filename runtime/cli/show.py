"""`metier show`: what a run did, step by step, or which runs of a batch failed and what was expected of them."""

from __future__ import annotations

import json as json_text
import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ...agents.errors import ResumeError
from ..console import say, show
from ..report.shown_run import ShownAsk, ShownRun, ShownStep, in_order_of_need, shown_run, unsolved
from ..runs.batches import how_to_answer
from ..settings.report import ReportSettings
from ..settings.session import load_settings
from ..store.commands import command
from ..store.records import BatchRecord
from ..store.store import RunStore
from .options import DEFAULT_STORE, AsJson, Sets, Store, overrides, stored_runs

__all__ = ["add_show_command"]

CELL_CHARACTERS = 200
"""Characters of a value in the list of a batch's runs."""

FAR_MORE_ASKS = 1_000_000


def add_show_command(app: typer.Typer) -> None:
    """Add `show` to the command line."""
    app.command("show", epilog="Example: `metier show`, or `metier show RUN attempt[1]/solver --json`")(show_runs)


def show_runs(
    which: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run, batch, or a batch's label; the newest batch by default.")
    ] = None,
    step: Annotated[
        str | None, typer.Argument(help="Path of a step, such as attempt[2]/critic: whole prompts of it alone.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Of a batch: also runs that were solved.")] = False,
    json: AsJson = False,
    store: Store = DEFAULT_STORE,
    set: Sets = None,
) -> None:
    """Show what a run asked and was answered, or which runs of a batch failed, with what was expected and what came.

    Prompts, answers, tries, tools, reasons, variants, tokens, seconds: all from the store, so of broken runs too.
    """
    settings = load_settings(None, overrides(set)).report
    with stored_runs(store) as runs:
        batch, run_id = _find(runs, which)
        if run_id is None and step is not None:
            raise ResumeError(f"{which} is a batch", expected="a run whose step to show")
        if run_id is None:
            _show_batch(runs, batch, settings, every, json)
            return
        found = shown_run(runs, run_id, settings if step is None else _with_every_ask(settings))
        found = found if step is None else found.at(step)
        if json:
            sys.stdout.write(json_text.dumps(found.data(), ensure_ascii=False) + "\n")
            return
        for line in _told(found, whole=step is not None):
            show(line)
        waiting = next((one for one in found.questions if one.answer is None), None)
        if waiting is not None:
            say(f"Answer with: {how_to_answer(runs, run_id, waiting.path)}")


def _with_every_ask(settings: ReportSettings) -> ReportSettings:
    """The settings with room for every ask of a step."""
    return settings.model_copy(update={"most_asks": FAR_MORE_ASKS})


def _find(runs: RunStore, which: str | None) -> tuple[BatchRecord, str | None]:
    """A batch and, where a run is meant, the run: also the only one of a batch. Raises: ResumeError."""
    batches = runs.batches()
    named = [batch for batch in batches if which in (None, batch.id, batch.label)]
    if not batches:
        raise ResumeError(f"no run in {runs.path}", remedy="Run a workflow: metier run --help.")
    if not named:
        run = runs.run(which or "")
        return runs.batch(run.batch), run.id
    own = runs.runs(named[-1].id)
    return named[-1], own[0].id if len(own) == 1 else None


def _show_batch(runs: RunStore, batch: BatchRecord, settings: ReportSettings, every: bool, as_json: bool) -> None:
    """The runs that failed or were not solved, or all."""
    records = runs.runs(batch.id)
    wanted = [run for run in in_order_of_need(records) if every or unsolved(run)]
    if as_json:
        data = [shown_run(runs, run.id, settings).data() for run in wanted]
        sys.stdout.write(json_text.dumps(data, ensure_ascii=False) + "\n")
        return
    say(f"{batch.id}: {len(records)} runs, {sum(map(unsolved, records))} of them failed, unsolved or waiting")
    if not wanted:
        say(f"See all: {command('show', batch.id, '--all', store=runs.path)}")
        return
    table = Table(box=None, pad_edge=False)
    for head in ("run", "task", "state", "score", "input", "expected", "got"):
        table.add_column(head, overflow="fold")
    for run in wanted:
        score = "–" if run.score is None else f"{run.score:g}"
        got = run.error or run.output or "–"
        cells = (run.id, run.task or "–", run.state, score, run.input, run.expected or "–", got)
        table.add_row(*(Text(cell if len(cell) <= CELL_CHARACTERS else f"{cell[:CELL_CHARACTERS]}…") for cell in cells))
    show(table)
    say(f"What one of them did: {command('show', wanted[0].id, store=runs.path)}")


def _told(run: ShownRun, whole: bool) -> Iterator[str]:
    """A run in lines; `whole` shows every message of a prompt, otherwise its last one."""
    score = "" if run.score is None else f", score {run.score:g}"
    yield f"{run.run}  {run.workflow}, {run.state}{score}, {run.seconds:.2f} s"
    if not whole:
        yield f"  input     {run.input}"
        if run.expected is not None:
            yield f"  expected  {run.expected}"
        yield f"  {'error     ' + run.error if run.error else 'output    ' + (run.output or '–')}"
    for step in run.steps:
        yield ""
        yield from _step_told(step, whole)
    if run.asks_left_out:
        yield f"\n{run.asks_left_out} further asks are not shown: raise report.most_asks, or name a step."
    for question in run.questions:
        yield f"\n{question.path}  {'waits for a person' if question.answer is None else 'a person was asked'}"
        yield f"  question  {question.question}"
        yield f"  answer    {question.answer or '– ' + question.gives}"


def _step_told(step: ShownStep, whole: bool) -> Iterator[str]:
    what = f"call of {step.tool}" if step.tool else step.role or "function"
    tries = f", {step.tries} tries" if step.tries > 1 else ""
    yield f"{step.path}  {what}, {step.state}{tries}, {step.seconds:.2f} s"
    for ask in step.asks:
        yield from _ask_told(ask, whole)
    if step.error:
        yield _block("error", step.error)
    if step.output is not None and (step.tool or not step.role):
        yield _block("gave", step.output)


def _ask_told(ask: ShownAsk, whole: bool) -> Iterator[str]:
    tokens = f"{ask.prompt_tokens} prompt tokens ({ask.cached_tokens} cached), {ask.thinking_tokens} thought, "
    cost = f"{tokens}{ask.answer_tokens} answered, {ask.seconds:.2f} s, {ask.cpu_s:.2f} CPU-s"
    yield f"  ask {ask.attempt} of {ask.variant}{f' on {ask.engine}' if ask.engine else ''}: {cost}"
    if ask.reason:
        yield _block("because", ask.reason)
    for message in ask.messages if whole else ask.messages[-1:]:
        yield _block(message["role"], message["content"])
    if ask.thinking:
        yield _block("thought", ask.thinking)
    yield _block("reply", ask.reply or "–")
    if ask.error:
        yield _block("misfit", ask.error)


def _block(name: str, text: str) -> str:
    """A name and a text whose further lines stand under its first."""
    return f"    {name:<9} " + text.replace("\n", "\n" + " " * 14)
