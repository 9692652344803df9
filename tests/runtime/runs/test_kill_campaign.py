"""kill -9 again and again in the middle of `metier run`: nothing recorded is lost or done twice."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

WORKFLOW = str(Path(__file__).parents[2] / "workflow_for_cli.py")
TASKS = 980
KILLS = 160


def metier(words: list[str], cwd: Path, die_at: int) -> int:
    """Run the command, killed (-9) at its n-th ask; its exit code."""
    command = [sys.executable, "-c", "from metier.runtime.cli.main import main; main()", *words]
    environment = {**os.environ, "TEST_DIE_AT": str(die_at)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=120).returncode


def recorded(store: Path) -> dict[tuple[str, str], tuple[str, float]]:
    """(run, path) → (output, finished at) of every finished step."""
    with sqlite3.connect(store) as db:
        rows = db.execute("SELECT run, path, output, finished_at FROM steps WHERE state = 'done'").fetchall()
    return {(run, path): (output, at) for run, path, output, at in rows}


@pytest.mark.faults
def test_kills_lose_nothing(tmp_path: Path) -> None:
    chance = random.Random(7)
    words = ["run", WORKFLOW, "--tasks", f"test:{TASKS}", "--engine", "scripted", "--concurrency", "7"]
    before: dict[tuple[str, str], tuple[str, float]] = {}
    for _ in range(KILLS):
        assert metier(words, tmp_path, chance.randint(2, 12)) == -signal.SIGKILL
        words = ["resume"]
        now = recorded(tmp_path / "runs" / "runs.db")
        assert before.items() <= now.items()
        before = now
    assert metier(words, tmp_path, 0) == 0
    now = recorded(tmp_path / "runs" / "runs.db")
    assert before.items() <= now.items()
    assert len(now) == 2 * TASKS
    with sqlite3.connect(tmp_path / "runs" / "runs.db") as db:
        again = db.execute(
            "SELECT count(*) FROM asks JOIN steps USING (run, path) WHERE asks.error IS NULL "
            "GROUP BY run, path HAVING count(*) > 1"
        ).fetchall()
        states = db.execute("SELECT DISTINCT state FROM runs WHERE score IS NOT NULL").fetchall()
        unscored = db.execute("SELECT count(*) FROM runs WHERE score IS NULL").fetchone()[0]
    assert again == []
    assert states == [("finished",)] and unscored == 0
