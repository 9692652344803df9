"""`metier chat` as a user has it: lines from a pipe or a terminal, ends that are clean, and the way back."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import subprocess
import termios
from pathlib import Path

import anyio
import pytest
import typer

from metier.agents import AskRejectedError, ResumeError, Role
from metier.examples import helpdesk
from metier.runtime import RunStore, open_session
from metier.runtime.cli.chat import LINE_BYTES
from metier.runtime.cli.ending import TO_MEND
from metier.runtime.cli.main import app
from tests.runtime.cli.test_cli import COMMAND, metier

HELPDESK = str(Path(__file__).parents[3] / "examples" / "helpdesk.py")

FLOW = """
import os, signal
from pydantic import BaseModel
from metier.agents import EngineError, Role, ScriptedBackend, TaskGraph, Turn

class Question(BaseModel):
    text: str
    earlier: list[Turn] = []

class Answer(BaseModel):
    value: int

class Said(BaseModel):
    ok: bool

adder = Role("adder", takes=Question, gives=Answer)
graph = TaskGraph("adding", takes=Question, gives=Answer)
graph.step(adder)
asking = TaskGraph("asking", takes=Question, gives=Said)
asking.ask_person("approve", takes=Question, gives=Said, question="Is {{ question.text }} fine?")
drafting = TaskGraph("drafting", takes=Question, gives=str)
draft = drafting.step(Role("drafter", takes=Question, gives=str))
drafting.ask_person("approve", takes={"draft": str}, gives=Said, question="Send it?", inputs={"draft": draft})
drafting.returns(draft)
plain = TaskGraph("plain", takes=Said, gives=Answer)
plain.step(Role("one", takes=Said, gives=Answer))

def scripted():
    def add(ask):
        text = ask.messages[-1].content
        if "die" in text and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if any("wrong" in message.content for message in ask.messages):
            return "no number"
        if "broken" in text:
            raise EngineError("the engine at port 1 is gone")
        return Answer(value=len(ask.messages))
    return ScriptedBackend({"adder": add, "drafter": lambda ask: "A draft."})
"""


@pytest.fixture
def flow(tmp_path: Path) -> str:
    file = tmp_path / "flow.py"
    file.write_text(FLOW)
    return str(file)


def chat(*words: str, said: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Talk line by line, as from a pipe."""
    env = {**os.environ, "COLUMNS": "200"}
    command = [*COMMAND, "chat", *words]
    return subprocess.run(command, cwd=cwd, env=env, input=said, capture_output=True, text=True, timeout=60)


def way_back(stderr: str) -> list[str]:
    """The words behind `metier chat` of the command that is suggested last."""
    return stderr.rstrip().rpartition("metier chat ")[2].split()


def test_each_line_is_a_turn_and_the_conversation_goes_on_later(tmp_path: Path) -> None:
    talk = chat(HELPDESK, "--role", "drafter", "--engine", "scripted", said="What?\n\nWhy?", cwd=tmp_path)
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout == "After 0 earlier turns.\nAfter 1 earlier turns.\n"
    again = chat(*way_back(talk.stderr), said="And now?\n", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == "After 2 earlier turns.\n"
    assert "> Why?\nAfter 1 earlier turns." in again.stderr
    with RunStore(tmp_path / "runs" / "runs.db") as store:
        (batch,) = store.batches()
        assert [run.state for run in store.runs(batch.id)] == ["finished"] * 3


def test_a_workflow_with_a_field_for_turns(tmp_path: Path) -> None:
    talk = chat(HELPDESK, "--engine", "scripted", said="What?\nWhy?\n", cwd=tmp_path)
    assert talk.returncode == 0, talk.stderr
    first, *_ = talk.stdout.splitlines()
    assert first.startswith("Draft '# question") and "After 1 earlier" in talk.stdout


def test_what_was_killed_within_a_turn_is_finished_first(flow: str, tmp_path: Path) -> None:
    killed = chat(flow, "--engine", "scripted", said="1 + 2\ndie\n", cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL and killed.stdout == '{"value":2}\n'
    with RunStore(tmp_path / "runs" / "runs.db") as store:
        (id,) = (batch.id for batch in store.batches())
    again = chat("--resume", id, said="3 + 4\n", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == '{"value":4}\n{"value":6}\n'


def test_a_turn_that_fails_is_told_and_the_next_one_is_not_shown_it(flow: str, tmp_path: Path) -> None:
    talk = chat(flow, "--engine", "scripted", said="wrong\n1 + 2\n", cwd=tmp_path)
    assert talk.returncode == 1 and talk.stdout == '{"value":2}\n'
    assert "AnswerError: role 'adder'" in talk.stderr and "Traceback" not in talk.stderr
    resumed = metier("resume", cwd=tmp_path)
    assert resumed.returncode == 2 and "is finished" in resumed.stderr
    named = metier("resume", way_back(talk.stderr)[1], cwd=tmp_path)
    assert named.returncode == 2 and "is a conversation" in named.stderr and "metier chat --resume" in named.stderr


def test_a_person_is_asked_in_the_same_place(flow: str, tmp_path: Path) -> None:
    talk = chat(f"{flow}:asking", "--engine", "scripted", said='This\nmaybe\n{"ok": true}\n', cwd=tmp_path)
    assert talk.stdout == '{"ok":true}\n', talk.stderr
    assert "Is This fine?" in talk.stderr and "ResumeError" in talk.stderr


def test_an_engine_that_fails_is_told_and_the_conversation_goes_on(flow: str, tmp_path: Path) -> None:
    talk = chat(flow, "--engine", "scripted", said="1 + 2\nbroken\n3 + 4\n", cwd=tmp_path)
    assert talk.returncode == 1 and talk.stdout == '{"value":2}\n{"value":4}\n', talk.stderr
    assert "EngineError: the engine at port 1 is gone" in talk.stderr
    assert "This conversation goes on with: metier chat --resume adding-" in talk.stderr


def test_a_line_that_is_too_long_is_refused_and_the_next_one_is_said(flow: str, tmp_path: Path) -> None:
    long = "ä" * (LINE_BYTES // 2) + "!"
    talk = chat(flow, "--engine", "scripted", said=f"1 + 2\n{long}\n3 + 4\n{2 * long}", cwd=tmp_path)
    assert talk.returncode == 1 and talk.stdout == '{"value":2}\n{"value":4}\n', talk.stderr
    assert f"a line of {LINE_BYTES + 1} bytes; expected at most {LINE_BYTES} bytes" in talk.stderr
    assert f"a line of {2 * LINE_BYTES + 2} bytes" in talk.stderr and "goes on with" in talk.stderr


def test_a_question_after_words_that_came_begins_a_line(flow: str, tmp_path: Path) -> None:
    talk = chat(f"{flow}:drafting", "--engine", "scripted", said="What?\n", cwd=tmp_path)
    assert talk.returncode == 0 and talk.stdout == "A draft.\n", talk.stderr
    assert "Send it?" in talk.stderr


def test_what_waits_in_a_conversation_is_answered_there(flow: str, tmp_path: Path) -> None:
    talk = chat(f"{flow}:asking", "--engine", "scripted", "--store", "c.db", said="This\n", cwd=tmp_path)
    assert talk.returncode == 0, talk.stderr
    id = way_back(talk.stderr)[1]
    go_on = f"metier chat --resume {id} --store c.db"
    listed = metier("questions", "--store", "c.db", cwd=tmp_path)
    shown = metier("show", id, "--store", "c.db", cwd=tmp_path)
    assert f"Answer with: {go_on}\n" in listed.stderr and f"Answer with: {go_on}\n" in shown.stderr
    resumed = metier("resume", "--store", "c.db", cwd=tmp_path)
    assert resumed.returncode == 2 and f"is the last turn of conversation {id}" in resumed.stderr, resumed.stderr
    assert f"Go on: {go_on}\n" in resumed.stderr
    answered = chat(*go_on.split()[2:], said='{"ok": true}\n', cwd=tmp_path)
    assert answered.stdout == '{"ok":true}\n', answered.stderr
    assert "is finished" in metier("resume", "--store", "c.db", cwd=tmp_path).stderr


def test_what_python_began_goes_on_here_where_its_workflow_has_a_file(tmp_path: Path) -> None:
    async def begin() -> tuple[str, str]:
        role = Role("helper", takes={"message": str}, gives=str)
        backend = helpdesk.scripted()
        async with open_session(backend=backend, store=tmp_path / "runs.db") as session:
            async with session.chat(helpdesk.graph) as talk, session.chat(role) as other:
                await talk.say("What?")
                with pytest.raises(AskRejectedError):
                    await other.say("Hello.")
        return talk.id, other.id

    id, role = anyio.run(begin)
    again = chat("--resume", id, "--store", "runs.db", said="Why?\n", cwd=tmp_path)
    assert again.returncode == 0 and "After 1 earlier" in again.stdout, again.stderr
    with pytest.raises(ResumeError, match="was begun from Python"):
        command = ["chat", "--resume", role, "--store", str(tmp_path / "runs.db")]
        typer.main.get_command(app)(command, standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.py"], "no workflow file"),
        (["{flow}:plain"], "no field for the earlier turns"),
        (["{flow}", "--role", "nobody"], "expected one of adder"),
        (["--role", "adder"], "--role adder without a workflow"),
        (["--resume", "nobody"], "no run store"),
        (["--resume", "nobody", "--store", "runs.db"], "no conversation 'nobody' in runs.db; expected one of none yet"),
        (["{flow}", "--resume", "some"], "a workflow or a role beside --resume"),
        (["--engine", "scripted"], "scripted"),
    ],
)
def test_what_is_yours_to_mend_is_named(
    flow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    RunStore("runs.db").close()
    with pytest.raises(TO_MEND, match=re.escape(said)):
        typer.main.get_command(app)(["chat", *(word.format(flow=flow) for word in words)], standalone_mode=False)


@pytest.mark.parametrize(("key", "status"), [(b"\x04", 0), (b"\x03", 130)], ids=["ctrl-d", "ctrl-c"])
def test_a_terminal_ends_it_with_ctrl_d_and_ctrl_c(tmp_path: Path, key: bytes, status: int) -> None:
    outside, inside = pty.openpty()
    words = [*COMMAND, "chat", HELPDESK, "--role", "drafter", "--engine", "scripted"]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inside)
    shown = b""

    def read_until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(outside, 4096)

    read_until(b"> ")
    os.write(outside, b"What?\n")
    read_until(b"After 0 earlier turns.\r\n> ")
    os.write(outside, key)
    try:
        read_until(b"--store runs/runs.db")
        assert process.wait(60) == status
    finally:
        process.kill()
        os.close(outside)
    assert b"Traceback" not in shown and b"metier chat --resume drafter-" in shown
