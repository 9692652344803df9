"""Inputs and answers on the command line: what goes to stdout, what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from metier.agents import MetierError, SettingsError
from metier.runtime import RunStore
from metier.runtime.cli.main import app

WORKFLOW = str(Path(__file__).parents[2] / "workflow_for_cli.py")
RUN = ("run", WORKFLOW, "--engine", "scripted")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metier(*words: str, stdin: str | bytes | None = None) -> Result:
    """Run the command line in this process; raises the error that it would show in a line."""
    done = CliRunner().invoke(app, list(words), input=stdin, prog_name="metier", env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_the_answer_is_on_stdout_and_nothing_else(folder: Path) -> None:
    (folder / "in.json").write_text('{"text": "4"}')
    for given, stdin in (('{"text": "4"}', None), ("@in.json", None), ("-", '{"text": "4"}')):
        for options in ((), ("--json",)):
            done = metier(*RUN, "--input", given, *options, stdin=stdin)
            assert done.stdout == '{"value":4}\n' and "1 of 1 runs ended" in done.stderr


def test_an_answer_is_written_to_a_file_instead(folder: Path) -> None:
    done = metier(*RUN, "--input", '{"text": "4"}', "--output", "out.json")
    assert done.stdout == "" and (folder / "out.json").read_text() == '{"value":4}\n'


def test_text_is_written_as_it_is_and_as_json_where_that_is_asked_for(folder: Path) -> None:
    (folder / "say.py").write_text(
        "from pydantic import BaseModel\nfrom metier.agents import TaskGraph\n"
        "class Name(BaseModel):\n    text: str\n"
        "def greet(name: Name) -> str:\n    return f'Hello, {name.text}'\n"
        "graph = TaskGraph('say', takes=Name, gives=str)\ngraph.step(greet)\n"
    )
    words = ("run", "say.py", "--input", '{"text": "Ada"}')  # no role asks, so that no engine is opened
    assert metier(*words).stdout == "Hello, Ada\n"
    assert metier(*words, "--json").stdout == '"Hello, Ada"\n'


def test_of_tasks_there_is_a_line_for_each(folder: Path) -> None:
    rows = [json.loads(line) for line in metier(*RUN, "--tasks", "test:3", "--json").stdout.splitlines()]
    assert [(row["task"], row["output"], row["score"], row["error"]) for row in rows] == [
        ("0", {"value": 0}, 1.0, None),
        ("1", {"value": -1}, 0.0, None),
        ("2", {"value": 2}, 1.0, None),
    ]
    done = metier(*RUN, "--tasks", "test:2", "--output", "rows.jsonl", "--label", "first try")
    assert "| first try | 2 | 1 of 2 |" in done.stdout
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("4 cows", r"--input '4 cows': it is not JSON: .*expected \{\"text\": …\}"),
        ('{"text": 4}', r"text: Input should be a valid string; expected \{\"text\": …\}"),
        ('["a"]', r"Input should be an object"),
        ('{"text": "a", "text": "b"}', "the key 'text' stands twice"),
        ('{"text": "\\ud800"}', "half a character"),
        ("@nowhere.json", "'@nowhere.json' cannot be read: there is no such file"),
        ("@.", "cannot be read: it is a folder"),
        ("@latin.json", "line 1 is not UTF-8 text"),
        ("-", "cannot be read: .*utf-8"),
    ],
)
def test_an_input_that_is_none_is_refused_before_an_engine_is_looked_for(folder: Path, given: str, says: str) -> None:
    (folder / "latin.json").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(SettingsError, match=says):
        metier("run", WORKFLOW, "--base", "nowhere", "--input", given, stdin=b'{"text": "\xe9"}')
    assert not (folder / "runs").exists()


def test_an_output_that_cannot_be_written_is_refused_first(folder: Path) -> None:
    with pytest.raises(SettingsError, match="none/a.json cannot be written"):
        metier(*RUN, "--input", '{"text": "4"}', "--output", "none/a.json")
    assert not (folder / "runs").exists()


def test_a_run_without_an_answer_prints_none(folder: Path) -> None:
    done = CliRunner().invoke(app, ["run", f"{WORKFLOW}:asking", *RUN[2:], "--input", '{"text": "4"}', "--json"])
    assert done.stdout == "" and isinstance(done.exception, MetierError)
    with RunStore(folder / "runs" / "runs.db") as store:
        (question,) = store.open_questions()
    assert (question.path, question.question, question.gives) == ("approve", "Is 4 fine?", '{"ok": true or false}')


def test_the_graph_names_the_roles_that_guidance_holds_to_their_type(folder: Path) -> None:
    (folder / "fives.py").write_text(
        "from typing import Annotated\nfrom pydantic import BaseModel, Field\n"
        "from metier.agents import Role, TaskGraph\n"
        "Five = Annotated[int, Field(multiple_of=5)]\n"
        "class Sum(BaseModel):\n    text: str\n"
        "def add(number: Five) -> int:\n    'Adds.'\n    return number\n"
        "graph = TaskGraph('fives', takes=Sum, gives=str)\n"
        "graph.step(Role('plain', takes=Sum, gives=int))\n"
        "graph.step(Role('typed', takes=Sum, gives=Five))\n"
        "graph.step(Role('caller', takes=Sum, gives=int, tools=[add]))\n"
        "graph.step(Role('teller', takes=Sum, gives=str))\n"
    )
    done = metier("graph", "fives.py")
    assert done.stdout.startswith("flowchart") and "guidance" not in done.stdout
    said = [line.partition(":")[0] for line in done.stderr.splitlines() if "guidance holds its replies" in line]
    assert said == ["role 'typed'", "role 'caller'"]
