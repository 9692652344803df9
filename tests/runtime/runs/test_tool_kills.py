"""kill -9 again and again between calls of tools and within them: no recorded call is made twice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.workflow_with_tools import TURNS

WORKFLOW = str(Path(__file__).parents[2] / "workflow_with_tools.py")


def metier(words: list[str], cwd: Path, die_at: int) -> int:
    """Run the command, killed (-9) at the n-th place; its exit code."""
    command = [sys.executable, "-c", "from metier.runtime.cli.main import main; main()", *words]
    environment = {**os.environ, "TEST_DIE_AT": str(die_at), "TEST_LOG": str(cwd / "calls.log")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=120).returncode


def recorded(db: sqlite3.Connection) -> dict[tuple[str, str], tuple[str, float]]:
    """(run, path) → (output, finished at) of every finished step and call."""
    rows = db.execute("SELECT run, path, output, finished_at FROM steps WHERE state = 'done'")
    return {(run, path): (output, at) for run, path, output, at in rows}


def answer(run: str, path: str, question: str, log: Path) -> list[str]:
    """The command that says of a call whether it was done, as a person who looks at its effects would."""
    arguments = re.search(r"was called with (\{.*?\})", question)
    assert arguments is not None
    made = json.loads(arguments[1])
    done = f"send {made['task']} {made['number']}\n" in log.read_text()
    said = {"result": f"send {made['number']}"} if done else {"call_again": True}
    return ["resume", run, "--answer", json.dumps(said), "--at", path]


def kill_and_resume(folder: Path, tasks: int, kills: int) -> None:
    """Kill at random places and resume, then let all of it end; look at what was done and at what is recorded."""
    chance = random.Random(11)
    store, log = folder / "runs" / "runs.db", folder / "calls.log"
    words = ["run", WORKFLOW, "--tasks", f"test:{tasks}", "--engine", "scripted", "--concurrency", "3"]
    before: dict[tuple[str, str], tuple[str, float]] = {}
    killed = 0
    while True:
        code = metier(words, folder, chance.randint(1, 12) if killed < kills else 0)
        killed += code == -signal.SIGKILL
        with sqlite3.connect(store) as db:
            now = recorded(db)
            asked = db.execute("SELECT run, path, question FROM questions WHERE answer IS NULL").fetchall()
            left = db.execute("SELECT count(*) FROM runs WHERE state != 'finished'").fetchone()[0]
        assert before.items() <= now.items(), "what is recorded stays as it is"
        before = now
        if not left:
            break
        words = answer(*asked[0], log) if asked else ["resume"]
    assert killed == kills, "there was work for every kill"

    made = Counter(log.read_text().splitlines())
    wanted = {f"{name} {task} {turn}" for name in ("look", "send") for task in range(tasks) for turn in range(TURNS)}
    assert made.keys() == wanted, "at least once"
    assert {line for line, times in made.items() if times > 1 and line.startswith("send")} == set(), "at most once"
    with sqlite3.connect(store) as db:
        calls = db.execute("SELECT count(*) FROM steps WHERE tool != '' AND state = 'done'").fetchone()[0]
        asks = db.execute("SELECT count(*) FROM asks WHERE error IS NULL").fetchone()[0]
    assert calls == len(wanted)
    assert asks == tasks * (TURNS + 1), "no reply that led to calls was asked for twice"


def test_a_few_kills_repeat_no_recorded_call(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, tasks=2, kills=2)


@pytest.mark.faults
def test_fifty_kills_repeat_no_recorded_call(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, tasks=40, kills=50)
