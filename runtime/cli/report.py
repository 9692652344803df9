"""The verb of the command line that reports runs: brief on the terminal, full as a page or as Markdown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...agents.errors import ResumeError, SettingsError
from ..console import show_markdown
from ..output_files import can_be_written, write_output
from ..report import render_html, render_markdown, render_report
from ..settings.session import load_settings
from ..store.store import RunStore
from .options import DEFAULT_STORE, Sets, Shelf, Store, TrafficFile, open_shelf, open_store, overrides, stored_runs
from .outcome import export

__all__ = ["add_report_command"]


def add_report_command(app: typer.Typer) -> None:
    """Add `report` to the command line."""
    app.command(
        epilog="Example: `metier report --html report.html`, or `metier report --store runs/runs.db > report.md`"
    )(report)


def report(
    batches: Annotated[
        list[str] | None,
        typer.Argument(
            help="Batches, their labels or runs; the newest by default. Several are compared with the first."
        ),
    ] = None,
    store: Store = DEFAULT_STORE,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the full report here, as one page that needs nothing.", callback=can_be_written),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the full report's tables here.", callback=can_be_written)
    ] = None,
    export_traffic: TrafficFile = None,
    probe: Annotated[
        Path | None, typer.Option(help="With --html or --markdown: a probe's folder, whose profiles are shown too.")
    ] = None,
    curves: Annotated[
        list[str] | None,
        typer.Option(help="With --html or --markdown: a variant whose thinking was swept; may be repeated."),
    ] = None,
    shelf: Shelf = None,
    set: Sets = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the batches there are.")] = False,
) -> None:
    """Report finished or broken runs, from the store alone: on the terminal, or in full as a page or Markdown."""
    if list_all:
        _list_batches(store)
        return
    if html is None and markdown is None:
        for option, given in (("--probe", probe), ("--curves", curves)):
            if given:
                raise SettingsError(f"{option} shows in the full report", expected="--html or --markdown beside it")
    with stored_runs(store) as runs:
        wanted = batches or [batch.id for batch in runs.batches()[-1:]]
        if export_traffic is not None:
            export(runs, _batches(runs, wanted), export_traffic)
            return
        if html is None and markdown is None:
            show_markdown(render_report(runs, _batches(runs, wanted) if wanted else []))
            return
        named = _batches(runs, wanted)
        swept = [open_shelf(shelf, set).get(name) for name in curves or []]
        if html is not None:
            write_output(html, render_html(runs, named, probe, swept, load_settings(None, overrides(set)).report))
        if markdown is not None:
            write_output(markdown, render_markdown(runs, named, probe, swept))


def _batches(store: RunStore, named: list[str]) -> list[str]:
    """The batches of these ids or labels, or of runs of these ids; raises ResumeError where there are none."""
    if not named:
        raise ResumeError(
            f"no batch in {store.path}", expected="one at least", remedy="Run a workflow first: metier run --help."
        )
    batches = store.batches()
    # Of several batches of one label the newest, and an id before a label.
    known = {batch.label: batch.id for batch in batches} | {batch.id: batch.id for batch in batches}
    return list(dict.fromkeys(known[name] if name in known else store.run(name).batch for name in named))


def _list_batches(store: Path) -> None:
    """Print a line for each batch, oldest first."""
    with open_store(store) as runs:
        for batch in runs.batches():
            states = [run.state for run in runs.runs(batch.id)]
            sys.stdout.write(f"{batch.id}\t{states.count('finished')} of {len(states)} finished\n")
