"""`metier report` and `metier bench` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from metier.agents import MetierError, ResumeError, SettingsError
from metier.runtime import RunStore
from metier.runtime.cli.main import app

WORKFLOW = str(Path(__file__).parents[2] / "workflow_for_cli.py")


def metier(*words: str) -> str:
    """Run the command line in this process and return what it prints; raises the error it would show in a line."""
    done = CliRunner().invoke(app, list(words), prog_name="metier", env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_a_run_is_reported_as_a_page_and_as_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metier("run", WORKFLOW, "--tasks", "test:2", "--engine", "scripted", "--label", "short")
    metier("run", WORKFLOW, "--tasks", "test:5", "--engine", "scripted")
    assert "| short | 2 | 1 of 2 |" in metier("report", "short")
    metier("report", "--html", "r.html", "--markdown", "r.md")
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert "| chain | 5 | 4 of 5 |" in (tmp_path / "r.md").read_text()
    with RunStore(Path("runs/runs.db")) as store:
        run = store.runs(store.batches()[-1].id)[0].id
    assert "| chain | 5 | 4 of 5 |" in metier("report", run)  # a run stands for its batch
    with pytest.raises(SettingsError, match="none/r.md cannot be written"):
        metier("report", "--markdown", "none/r.md")
    with pytest.raises(ResumeError, match="no run 'nobody'"):
        metier("report", "nobody", "--markdown", "r.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.md", "runs"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("report --html r.html", "no run store runs/runs.db"),
        ("report --probe x", "--probe shows in the full report; expected --html or --markdown"),
        ("report --curves x", "--curves shows in the full report; expected --html or --markdown"),
        ("bench", "neither or both of a trace and a synthetic mix"),
        ("bench nope.db", "no trace nope.db"),
        ("bench --synthetic 4 --concurrency x", "--concurrency 'x'"),
        ("bench --synthetic 4 --cache hot", "--cache 'hot'"),
        ("bench --synthetic 4 --input-words 9-3", "--input-words '9-3' is no range"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MetierError) as caught:
        metier(*words.split())
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["report", "bench"])
def test_each_verb_has_help_with_an_example(verb: str) -> None:
    assert f"Example: metier {verb}" in metier(verb, "--help")
