"""Memory over a kill and on an engine: a resumed run remembers the same, and the prefix cache has what is shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from metier.agents import Ask, Reply, Role, ScriptedBackend, TaskGraph, Usage
from metier.agents.backend import OnText
from metier.runtime import RunStore, open_session
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from tests.agents.workflow import Puzzle, Verdict
from tests.runtime.conftest import TINY

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


@pytest.mark.engine
async def test_the_engine_has_cached_what_is_remembered(tiny_engine: InProcessEngine) -> None:
    """Every prompt begins with the whole last one, whose blocks need not be computed again."""

    class OnEngine:
        def __init__(self) -> None:
            self.usage: list[Usage] = []

        async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
            reply = await tiny_engine.generate(EngineRequest(ask))
            self.usage.append(reply.usage)
            return reply

    role = Role("speaker", takes=Puzzle, gives=Literal["yes", "no"], instructions="Speak.", memory=True, max_tokens=8)
    graph = TaskGraph("talk", takes=Puzzle, gives=role.gives)
    with graph.loop("round", max_rounds=3):
        graph.returns(graph.step(role))
    backend = OnEngine()
    async with open_session(backend=backend, store=":memory:") as session:
        await session.run(graph, Puzzle(text=f"Is {uuid.uuid4()} even?"))
    for before, after in zip(backend.usage, backend.usage[1:], strict=False):
        assert after.prompt_tokens > before.prompt_tokens
        assert after.cached_tokens >= before.prompt_tokens // TINY.block_tokens * TINY.block_tokens
