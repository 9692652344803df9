"""What a batch is told with when it has ended: its answers, its report, and the error of runs that have none."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.errors import RunError, RunInterrupted, RunTakenError
from ...agents.recorded_values import as_json
from ...agents.traffic import write_traffic
from ..console import say, show_markdown
from ..output_files import write_output, writing
from ..report import render_report
from ..runs.run_plan import RunResult
from ..store.commands import command
from ..store.store import RunStore

__all__ = ["Outlet", "export", "finish"]


@dataclass(frozen=True)
class Outlet:
    """Where a batch's answers and its report go.

    `alone` says that it is one run on one input, whose answer is what one wants to see; `as_json` that stdout gets the
    answers as JSON and nothing else; `output` that this file gets them instead of stdout.
    """

    report: Path | None = None
    export_traffic: Path | None = None
    as_json: bool = False
    output: Path | None = None
    alone: bool = False


def finish(runs: RunStore, batch: str, results: Sequence[RunResult], outlet: Outlet) -> None:
    """Tell and write what came of a batch; raises the error of its only run, RunError when several failed."""
    text = render_report(runs, [batch])
    if not outlet.alone and not outlet.as_json:
        show_markdown(text)
    if outlet.report is not None:
        write_output(outlet.report, text)
    if outlet.export_traffic is not None:
        export(runs, [batch], outlet.export_traffic)
    _tell_answers(runs, results, outlet)
    _raise_errors(runs, batch, results)
    if outlet.alone and not outlet.as_json:
        (run,) = results
        say(f"What it did: {command('show', run.run_id, store=runs.path)}")


def export(runs: RunStore, batches: Sequence[str], path: Path) -> None:
    """Write what batches asked and were answered; raises SettingsError when the file cannot be written."""
    with writing(path):
        count = write_traffic(path, (row for batch in batches for row in runs.traffic(batch)))
    say(f"wrote {count} asks to {path}")


def _tell_answers(runs: RunStore, results: Sequence[RunResult], outlet: Outlet) -> None:
    """The answer of a run on one input, or a line of JSON for each run of several."""
    if outlet.alone:
        told = [_answer(run, outlet) for run in results if run.error is None]
    elif outlet.as_json or outlet.output is not None:
        told = [json.dumps(_row(runs, run), ensure_ascii=False) for run in results]
    else:
        return
    text = "".join(f"{one}\n" for one in told)
    if outlet.output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    elif told:
        write_output(outlet.output, text)


def _answer(run: RunResult, outlet: Outlet) -> str:
    if isinstance(run.output, str) and not outlet.as_json and outlet.output is None:
        return run.output
    return as_json(run.output)


def _row(runs: RunStore, run: RunResult) -> dict[str, Any]:
    output = None if run.error is not None else json.loads(as_json(run.output))
    error = None if run.error is None else str(run.error)
    row = {"run": run.run_id, "task": runs.run(run.run_id).task, "output": output, "score": run.score, "error": error}
    return row


def _raise_errors(runs: RunStore, batch: str, results: Sequence[RunResult]) -> None:
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
    if failed:
        raise RunError(
            f"{len(failed)} of {len(results)} runs failed; the first: {failed[0].problem}",
            remedy=f"Mend what it says, then go on: {resume}",
        )
    if taken:
        raise taken[0]
