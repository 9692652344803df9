"""`metier questions` and `metier resume`: also for runs that a Python program started."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from metier.agents import GraphError, ResumeError, RunInterrupted
from metier.runtime import RunStore
from tests.runtime.cli.test_answers import WORKFLOW, metier

PROGRAM = """
import anyio
from pydantic import BaseModel
from metier.agents import Role, RunInterrupted, ScriptedBackend, TaskGraph
from metier.runtime import open_session

class Draft(BaseModel):
    text: str

class Verdict(BaseModel):
    ok: bool

def shout(draft: Draft) -> Draft:
    return Draft(text=draft.text.upper())

def sealed(draft: Draft, verdict: Verdict) -> str:
    return f"{draft.text}: {verdict.ok}"

graph = TaskGraph("ask", takes=Draft, gives=str)
loud = graph.step(shout)
said = graph.ask_person("allowed", takes=Draft, gives=Verdict, question="May {{ draft.text }} go?", after=loud,
                        inputs={"draft": loud})
graph.step(sealed, after=said, inputs={"draft": loud})

async def main():
    async with open_session(backend=ScriptedBackend({}), store="p.db") as session:
        try:
            await session.run(graph, Draft(text="x"))
        except RunInterrupted as waits:
            print(waits.run_id, str(waits), sep="|")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(folder: Path, ending: str) -> list[str]:
    """Run the program, and return the run's id and what the interrupt says."""
    (folder / "flow.py").write_text(PROGRAM + ending)
    done = subprocess.run([sys.executable, "flow.py"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


def test_a_run_that_python_started_is_answered_from_a_shell(folder: Path) -> None:
    run, said = program(folder, 'if __name__ == "__main__":\n    anyio.run(main)\n')
    pasted = said.partition("Answer with: ")[2].replace("{…}", '{"ok": true}')
    assert shlex.split(pasted)[:3] == ["metier", "resume", run]
    listed = metier("questions", "--store", "p.db")
    assert run in listed.stdout and "May X go?" in listed.stdout and '{"ok": true or false}' in listed.stdout
    assert f"metier resume {run} --answer '{{…}}' --at allowed --store p.db" in listed.stderr
    (row,) = json.loads(metier("questions", "--store", "p.db", "--json").stdout)
    assert (row["run"], row["path"]) == (run, "allowed") and row["asked_at"] > 0
    assert metier(*shlex.split(pasted)[1:]).stdout == "X: True\n"
    assert "Nothing in p.db waits for a person" in metier("questions", "--store", "p.db").stderr


def test_a_program_that_starts_runs_when_it_is_loaded_is_not_loaded(folder: Path) -> None:
    """A command would start a run of its own with it; a file that only holds the workflow is named instead."""
    run, said = program(folder, "anyio.run(main)\n")
    assert f"Answer with: session.resume(graph, '{run}', answers={{'allowed': …}})" in said
    with pytest.raises(ResumeError, match=f"metier resume {run} --workflow FILE.py --store p.db, or go on in Python"):
        metier("resume", run, "--store", "p.db", "--answer", '{"ok": true}')
    with pytest.raises(GraphError, match="no workflow file"):
        metier("resume", run, "--store", "p.db", "--workflow", "nowhere.py")
    (folder / "only.py").write_text(PROGRAM)
    words = ("resume", run, "--store", "p.db", "--answer", '{"ok": false}')
    assert metier(*words, "--workflow", "only.py:graph").stdout == "X: False\n"


def test_a_backend_of_ones_own_is_asked_for(folder: Path) -> None:
    roles = PROGRAM.replace("loud = graph.step(shout)", 'loud = graph.step(Role("shout", takes=Draft, gives=Draft))')
    loud = 'ScriptedBackend(default=lambda ask: Draft(text="X"))'
    (folder / "flow.py").write_text(
        roles.replace("ScriptedBackend({})", loud) + 'if __name__ == "__main__":\n    anyio.run(main)\n'
    )
    done = subprocess.run([sys.executable, "flow.py"], cwd=folder, capture_output=True, text=True, timeout=60)
    run = done.stdout.partition("|")[0]
    words = ("resume", run, "--store", "p.db")
    with pytest.raises(ResumeError, match="a backend of its own, ScriptedBackend; expected the name of an engine"):
        metier(*words, "--answer", '{"ok": true}')
    (folder / "flow.py").write_text(f"{roles}\ndef scripted():\n    return {loud}\n")
    assert metier(*words, "--answer", '{"ok": true}', "--json").stdout == '"X: True"\n'


def test_an_answer_is_checked_before_an_engine_is_looked_for(folder: Path) -> None:
    run = waiting()
    with RunStore(folder / "runs" / "runs.db") as store:
        batch = store.batches()[0]
        engine = {**batch.options, "engine": "embedded", "base": "nowhere"}
        with store.transaction() as db:
            db.execute("UPDATE batches SET options = ?", (json.dumps(engine),))
    with pytest.raises(ResumeError, match=r"the answer \{\"okay\": 1\} does not fit the question at 'approve'"):
        metier("resume", run, "--answer", '{"okay": 1}')
    with pytest.raises(ResumeError, match="no question at 'nowhere'; expected one of approve"):
        metier("resume", run, "--answer", '{"ok": true}', "--at", "nowhere")


def test_a_question_is_answered_once(folder: Path) -> None:
    run = waiting()
    with RunStore(folder / "runs" / "runs.db") as store:
        store.answer_question(run, "approve", '{"ok":true}')  # kept, and killed before the run went on
    with pytest.raises(ResumeError, match=r"'approve' of run \S+ is answered already: '\{\"ok\":true\}'"):
        metier("resume", run, "--answer", '{"ok": false}', "--at", "approve")
    assert metier("resume", run).stdout == '{"value":4}\n'
    with pytest.raises(ResumeError, match="is finished"):
        metier("resume", run, "--answer", '{"ok": false}', "--at", "approve")


def test_a_run_of_another_store_is_named(folder: Path) -> None:
    waiting()
    with pytest.raises(ResumeError, match=r"no run 'other-1' in runs/runs.db; expected one of asking-.*--store"):
        metier("resume", "other-1", "--answer", "1")
    with pytest.raises(ResumeError, match="no run store none.db"):
        metier("questions", "--store", "none.db")


def waiting() -> str:
    """A run that waits for a person's answer; its id."""
    with pytest.raises(RunInterrupted) as waits:
        metier("run", f"{WORKFLOW}:asking", "--engine", "scripted", "--input", '{"text": "4"}')
    return waits.value.run_id
