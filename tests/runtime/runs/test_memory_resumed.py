"""Memory over a kill: a resumed run remembers the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from metier.agents import Ask, Role, ScriptedBackend, TaskGraph
from metier.runtime import RunStore, open_session
from tests.agents.workflow import Puzzle, Verdict

pytestmark = pytest.mark.anyio


class PowerCut(BaseException):
    """Ends the process, and is no error of a run."""


async def test_a_resumed_run_remembers_the_same() -> None:
    """Also where turns have fallen out."""
    role = Role("speaker", takes=Puzzle, gives=str, memory=True, memory_tokens=60)
    judge = Role("judge", takes={"text": str}, gives=Verdict)
    graph = TaskGraph("debate", takes=Puzzle, gives=str)
    with graph.loop("talk", max_rounds=6):
        said = graph.step(role)
        graph.step(judge, inputs={"text": said})
    graph.returns(said)
    power = True

    def judge_dies(ask: Ask) -> Verdict:
        nonlocal power
        if ask.round == 4 and power:
            power = False
            raise PowerCut
        return Verdict(correct=False)

    def speaks(ask: Ask) -> str:
        return f"turn {ask.step_path}"

    cut = ScriptedBackend({"speaker": speaks, "judge": judge_dies})
    with RunStore(":memory:") as store:
        async with open_session(backend=cut, store=store) as session:
            with pytest.raises(PowerCut):
                await session.run(graph, Puzzle(text="x"))
        async with open_session(backend=cut, store=store) as session:
            await session.resume(graph, store.runs(store.batches()[0].id)[0].id)
    whole = ScriptedBackend({"speaker": speaks}, default=lambda ask: Verdict(correct=False))
    async with open_session(backend=whole, store=":memory:") as session:
        await session.run(graph, Puzzle(text="x"))
    there, here = ([ask.messages for ask in backend.asks if ask.role == "speaker"] for backend in (whole, cut))
    assert there == here and len(there[4]) < len(there[3]), "something had fallen out"


TALK = """
import os, signal, sys
import anyio
from pydantic import BaseModel
from metier.agents import Role, ScriptedBackend, TaskGraph, tool
from metier.runtime import open_session

class Puzzle(BaseModel):
    text: str

@tool
def look_up(word: str) -> str:
    return f"about {word}"

speaker = Role("speaker", takes=Puzzle, gives=str, memory=True, memory_tokens=400, tools=[look_up])
graph = TaskGraph("talk", takes=Puzzle, gives=str)
with graph.loop("round", max_rounds=5):
    graph.returns(graph.step(speaker))
left = int(sys.argv[2])

def reply(ask):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if ask.messages[-1].content.startswith("Results"):
        return f'"round {ask.round} with {len(ask.messages)}"'
    return {"tool_calls": [{"name": "look_up", "arguments": {"word": f"cow {ask.round}"}}]}

async def main():
    async with open_session(backend=ScriptedBackend(default=reply), store=sys.argv[1]) as session:
        known = [run.id for batch in session.store.batches() for run in session.store.runs(batch.id)]
        run = known[0] if known else session.prepare(graph, Puzzle(text="What is a cow?"))
        print(await session.resume(graph, run))
        for row in session.store.traffic():
            print(row.step_path, [message.content for message in row.messages], row.reply)

anyio.run(main)
"""


def test_a_killed_process_goes_on_with_what_it_remembered(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    talk = partial(subprocess.run, capture_output=True, text=True, timeout=120, env=environment)
    words: list[Any] = [sys.executable, "-c", TALK, str(tmp_path / "killed.db")]
    assert talk([*words, "3"]).returncode == -signal.SIGKILL  # behind the call of the second round
    assert talk([*words, "4"]).returncode == -signal.SIGKILL  # in the fourth
    killed, whole = talk([*words, "99"]), talk([*words[:-1], str(tmp_path / "whole.db"), "99"])
    assert killed.returncode == 0, killed.stderr
    assert killed.stdout == whole.stdout and killed.stdout.startswith("round 5 with ")
