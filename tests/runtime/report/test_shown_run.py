"""What a run did, as `metier show` and the report show it: read from the store, cut, left out where secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metier.agents import ResumeError
from metier.runtime import RunStore
from metier.runtime.report import render_html
from metier.runtime.report.shown_run import shown_run
from metier.runtime.settings.report import ReportSettings
from tests.runtime.cli.test_answers import WORKFLOW, folder, metier
from tests.runtime.cli.test_resuming_from_a_shell import waiting
from tests.workflow_with_tools import __file__ as TOOLS

__all__ = ["folder"]

RUN = ("run", WORKFLOW, "--engine", "scripted")


def test_the_runs_of_a_batch_that_failed_are_shown_with_what_was_expected(folder: Path) -> None:
    metier(*RUN, "--tasks", "test:3", "--label", "first")
    for words in ((), ("first",)):
        done = metier("show", *words)
        assert "3 runs, 1 of them failed, unsolved or waiting" in done.stderr
        line = done.stdout.splitlines()[1]
        assert line.split()[1:] == ["1", "finished", "0", '{"text":"1"}', "1", '{"value":-1}']
    assert len(metier("show", "--all").stdout.splitlines()) == 4
    (run,) = json.loads(metier("show", "--json").stdout)
    assert (run["expected"], run["output"], run["score"], run["input"]) == ("1", {"value": -1}, 0.0, {"text": "1"})


def test_a_run_is_shown_step_by_step(folder: Path) -> None:
    metier(*RUN, "--input", '{"text": "7"}')
    text = metier("show").stdout
    assert "planner  planner, done" in text and "because   role 'planner' is not assigned: default" in text
    assert "user      # puzzle\n              7\n" in text and 'reply     {"value":7}' in text
    run = text.split()[0]
    step = metier("show", run, "solver").stdout
    assert "system    You are one specialist" in step and "planner" not in step
    with pytest.raises(ResumeError, match="has no step 'critic'; expected one of planner, solver"):
        metier("show", run, "critic")


def test_calls_of_tools_and_questions_are_shown(folder: Path) -> None:
    metier("run", TOOLS, "--engine", "scripted", "--tasks", "test:1")
    assert "call of " in metier("show").stdout
    run = waiting()
    done = metier("show", run)
    assert "question  Is 4 fine?" in done.stdout and '– {"ok": true or false}' in done.stdout
    assert f"metier resume {run} --answer '{{…}}' --at approve --store runs/runs.db" in done.stderr


def test_runs_of_another_store_and_steps_of_a_batch_are_errors(folder: Path) -> None:
    with pytest.raises(ResumeError, match="no run store runs/runs.db"):
        metier("show")
    metier(*RUN, "--tasks", "test:2")
    with pytest.raises(ResumeError, match="no run 'nobody'"):
        metier("show", "nobody")
    with pytest.raises(ResumeError, match="is a batch; expected a run whose step to show"):
        metier("show", batch(folder), "solver")


def batch(folder: Path) -> str:
    """The newest batch."""
    with RunStore(folder / "runs" / "runs.db") as store:
        return store.batches()[-1].id


def test_long_texts_are_cut_and_asks_beyond_the_setting_left_out(folder: Path) -> None:
    metier(*RUN, "--input", json.dumps({"text": "4" * 500}))
    with RunStore(folder / "runs" / "runs.db") as store:
        run = store.runs(batch(folder))[0].id
        cut = shown_run(store, run, ReportSettings(text_characters=100, most_asks=1))
        whole = shown_run(store, run, ReportSettings())
    assert cut.asks_left_out == 1 and [len(step.asks) for step in cut.steps] == [1, 0]
    assert cut.input.endswith("more characters)") and len(cut.input) < 140 < len(whole.input)
    assert isinstance(cut.data()["input"], str) and whole.data()["input"] == {"text": "4" * 500}


def test_the_page_folds_runs_and_leaves_texts_out_where_they_are_secret(folder: Path) -> None:
    metier(*RUN, "--tasks", "test:5")
    with RunStore(folder / "runs" / "runs.db") as store:
        page = render_html(store, [batch(folder)], settings=ReportSettings(most_runs=2))
        secret = render_html(store, [batch(folder)], settings=ReportSettings(texts=False))
        none = render_html(store, [batch(folder)], settings=ReportSettings(most_runs=0))
    assert page.count('<details class="run">') == 2 and "2 of 5 are shown" in page
    assert page.index("task 1, finished, score 0") < page.index("task 0, finished, score 1")
    assert "<dt>expected</dt><dd><pre>1</pre>" in page and "# Your step: planner" in page
    assert secret.count('<details class="run">') == 5 and "# Your step" not in secret and "expected" not in secret
    assert '<details class="run">' not in none
