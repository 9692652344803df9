"""The command line as a newcomer uses it, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

QUESTIONS = str(Path(__file__).parents[2] / "workflow_of_questions.py")
COMMAND = (sys.executable, "-c", "from metier.runtime.cli.main import main; main()")
WORKFLOW = str(Path(__file__).parents[2] / "workflow_for_cli.py")


def metier(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line and wait for it."""
    command = [*COMMAND, *words]
    env = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def started(*words: str, cwd: Path, preexec_fn: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    """Start a run that hangs at its third task, and return once it does."""
    command = [*COMMAND, *words]
    here, there = os.pipe()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "TEST_HANG": str(there)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[there],
        preexec_fn=preexec_fn,
    )
    os.close(there)
    said = os.read(here, 4)
    os.close(here)
    assert said == b"here", process.communicate()[1]
    return process


def recorded_states(store: Path) -> set[str]:
    """The states that the runs of a store are in."""
    with sqlite3.connect(store) as db:
        return {state for (state,) in db.execute("SELECT state FROM runs")}


def table(report: str) -> dict[str, dict[str, str]]:
    """Role → what a report says of it, without what differs between runs: seconds, and asks that Ctrl-C cut off."""
    heads: list[str] = []
    roles: dict[str, dict[str, str]] = {}
    for line in report.splitlines():
        cells = line.strip("| ").split(" | ")
        if cells[0] == "role":
            heads = cells
        elif cells[0] in ("planner", "solver"):
            roles.setdefault(cells[0], {}).update(zip(heads, cells, strict=True))
    for role in roles.values():
        role["asks"] = str(int(role["asks"]) - int(role.pop("lost", "0")))
    return {role: {head: cell for head, cell in row.items() if not head.endswith(" s")} for role, row in roles.items()}


def test_run_prints_and_writes_a_report(tmp_path: Path) -> None:
    done = metier(
        "run", WORKFLOW, "--tasks", "test:5", "--engine", "scripted", "--report", "r.md", "--export-traffic", "t.jsonl",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 of 5" in done.stdout
    assert (tmp_path / "r.md").read_text() == done.stdout
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and {row["role"] for row in rows} == {"planner", "solver"}
    assert "5 of 5 runs ended, 4 solved" in done.stderr
    again = metier("report", cwd=tmp_path)
    assert again.stdout == done.stdout


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_table(tmp_path: Path, signal_number: int) -> None:
    words = ("run", WORKFLOW, "--tasks", "test:6", "--engine", "scripted", "--concurrency", "2")
    (tmp_path / "whole").mkdir()
    whole = metier(*words, cwd=tmp_path / "whole")
    process = started(*words, cwd=tmp_path)
    process.send_signal(signal_number)
    _, said = process.communicate(timeout=60)
    states = recorded_states(tmp_path / "runs" / "runs.db")
    if signal_number == signal.SIGKILL:
        assert "running" in states
    else:
        assert process.returncode == 128 + signal_number
        assert "running" not in states and "stopped" in states
        last = said.splitlines()[-1]
        assert re.fullmatch(
            r"Stopped\. What was recorded is kept; go on: metier resume \S+ --store runs/runs\.db", last
        )
        assert "Traceback" not in said
    done = metier("resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 of 6" in done.stdout
    assert table(done.stdout) == table(whole.stdout)
    none_left = metier("resume", cwd=tmp_path)
    assert none_left.returncode == 2 and "every run in runs/runs.db is finished" in none_left.stderr


def test_a_person_is_asked_and_answers(tmp_path: Path) -> None:
    words = ("run", f"{WORKFLOW}:asking", "--engine", "scripted", "--input", '{"text": "4"}')
    waits = metier(*words, cwd=tmp_path)
    assert waits.returncode == 3
    found = re.search(r"metier resume (\S+)", waits.stderr)
    assert found and "approve: Is 4 fine?" in waits.stderr
    wrong = metier("resume", found[1], "--answer", '{"okay": 1}', cwd=tmp_path)
    assert wrong.returncode == 2 and "no Approval" in wrong.stderr
    done = metier("resume", found[1], "--answer", '{"ok": true}', "--at", "approve", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '{"value":4}\n'


def test_two_questions_of_one_name_are_answered_apart(tmp_path: Path) -> None:
    waits = metier("run", QUESTIONS, "--engine", "scripted", "--input", '{"name": "tea"}', cwd=tmp_path)
    found = re.search(r"metier resume (\S+) --answer '{…}' --at budget/approve --store runs/runs.db", waits.stderr)
    assert waits.returncode == 3 and found
    several = metier("resume", found[1], "--answer", '{"who": "Ada"}', cwd=tmp_path)
    assert several.returncode == 2 and "--at with one of budget/approve, owner/approve" in several.stderr
    misfit = metier("resume", found[1], "--answer", '{"euros": 3}', "--at", "owner/approve", cwd=tmp_path)
    assert misfit.returncode == 2 and "does not fit the question at 'owner/approve'" in misfit.stderr
    one = metier("resume", found[1], "--answer", '{"who": "Ada"}', "--at", "owner/approve", cwd=tmp_path)
    assert one.returncode == 3 and "owner/approve" not in one.stderr
    done = metier("resume", found[1], "--answer", '{"euros": 3}', cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == '{"text":"Ada: 3"}\n'


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "nope.py"), "GraphError: no workflow file 'nope.py'"),
        (("run", WORKFLOW), "SettingsError: neither or both of --tasks and --input"),
        (("run", f"{WORKFLOW}:nope", "--tasks", "test:1"), "no TaskGraph named 'nope'; expected one of asking, graph"),
        (("run", WORKFLOW, "--tasks", "tests:1"), "TaskSetError: task spec 'tests:1' cannot be read"),
        (("run", WORKFLOW, "--input", '{"txt": "4"}'), 'text: Field required; expected {"text": …}'),
        (("run", WORKFLOW, "--tasks", "test:1", "--set", "x"), "SettingsError: --set 'x'; expected name=value"),
        (("run", WORKFLOW, "--tasks", "test:1", "--engine", "scripted", "--max-tokens", "0"), "SettingsError: limits"),
        (("run", WORKFLOW, "--tasks", "test:1", "--assignment", "a.yaml"), "AssignmentError: the assignment"),
        (("resume",), "ResumeError: no run store runs/runs.db"),
        (("report",), "ResumeError: no run store runs/runs.db"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = metier(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("run", WORKFLOW, "--tasks", "test:2", "--engine", "scripted", "--report", "none/r.md"),
        ("run", WORKFLOW, "--tasks", "test:2", "--engine", "scripted", "--export-traffic", "."),
        ("resume", "--report", "none/r.md"),
        ("resume", "--export-traffic", "none/t.jsonl"),
        ("report", "--html", "none/r.html"),
        ("report", "--markdown", "none/r.md"),
        ("report", "--export-traffic", "none/t.jsonl"),
        ("demo", "--engine", "scripted", "--report", "none/r.md"),
        ("store", "recover", "runs.db", "--out", "none/saved.db"),
        ("report", "--html", f"{'r' * 252}.html"),
        ("bench", "--synthetic", "4", "--out", "none/b.jsonl"),
        ("assign", "--out", "none/a.yaml"),
        ("graph", WORKFLOW, "--out", "none/g.mmd"),
        ("variants", "draw", "solver", "none/d.svg"),
    ],
)
def test_output_files_are_checked_before_anything_runs(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = metier(*words, cwd=tmp_path)
    assert done.returncode == 2 and "cannot be written" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("probe", WORKFLOW, "--tasks", "tune:2", "--variants", "base", "--engine", "scripted", "--out", "file/probe"),
        ("probe", WORKFLOW, "--tasks", "tune:2", "--variants", "base", "--engine", "scripted", "--out", "file"),
        ("variants", "export", "solver", "file/solver"),
        ("variants", "export", "solver", "s" * 300),
        ("make", "recipe.yaml", "--work-dir", "file/work"),
    ],
)
def test_folders_are_tried_before_anything_runs(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("no folder")
    done = metier(*words, cwd=tmp_path)
    assert done.returncode == 2 and "cannot hold files" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_limit_of_the_settings_stops_runs(tmp_path: Path) -> None:
    words = ("run", WORKFLOW, "--tasks", "test:2", "--engine", "scripted", "--set", "limits.max_tokens=1")
    done = metier(*words, cwd=tmp_path)
    assert done.returncode == 1 and "expected at most max_tokens=1" in done.stderr
    assert recorded_states(tmp_path / "runs" / "runs.db") == {"stopped"}
    assert metier(*words, "--max-tokens", "100000", "--store", "other.db", cwd=tmp_path).returncode == 0
    assert metier("resume", "--max-tokens", "100000", cwd=tmp_path).returncode == 0


def test_traffic_of_a_recorded_batch_is_exported_later(tmp_path: Path) -> None:
    metier(
        "run", WORKFLOW, "--tasks", "test:5", "--engine", "scripted", "--export-traffic", "at-once.jsonl", cwd=tmp_path
    )
    later = metier("report", "--export-traffic", "later.jsonl", cwd=tmp_path)
    assert later.returncode == 0 and "wrote 10 asks to later.jsonl" in later.stderr
    assert (tmp_path / "later.jsonl").read_text() == (tmp_path / "at-once.jsonl").read_text()


def test_sigterm_stops_a_job_that_its_shell_shields_from_ctrl_c(tmp_path: Path) -> None:
    process = started(
        "run", WORKFLOW, "--tasks", "test:6", "--engine", "scripted", cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "go on: metier resume" in said and "Traceback" not in said
    assert "running" not in recorded_states(tmp_path / "runs" / "runs.db")


def test_a_full_disk_is_one_error_and_nothing_recorded_is_lost(tmp_path: Path) -> None:
    """The kernel lets no file grow past a limit, which SQLite meets in the middle of the batch."""
    words = ("run", WORKFLOW, "--tasks", "test:200", "--engine", "scripted", "--concurrency", "16")

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [*COMMAND, *words, "--store", "my runs.db"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=60, preexec_fn=full,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    assert len(errors) == 1 and errors[0].startswith("StoreError: the run store my runs.db cannot be written")
    found = re.search(r"go on: (metier resume --store 'my runs.db')\.", errors[0])
    assert found
    again = metier(*shlex.split(found[1])[1:], cwd=tmp_path)
    assert again.returncode == 0 and "199 of 200" in again.stdout, again.stderr


def test_every_verb_has_help_with_an_example(tmp_path: Path) -> None:
    for verb in ("run", "resume", "report", "demo", "make", "variants", "probe", "assign", "doctor", "graph"):
        done = metier(verb, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert f"Example: metier {verb}" in done.stdout
