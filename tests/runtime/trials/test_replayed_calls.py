"""A probe makes equal calls of tools once, and verifies answers, never the calls before them."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents import Tool, tool
from metier.router import Candidate
from metier.router.probing.journal import Journal
from metier.runtime.settings.tools import ToolSettings
from metier.runtime.tools.calling import CallResult
from metier.runtime.trials.probe_options import ProbeOptions
from metier.runtime.trials.replayed_calls import RecordedCall, ReplayedCalls
from metier.runtime.trials.run_probe import open_trials

pytestmark = pytest.mark.anyio

made: list[str] = []


def look(word: str) -> str:
    """Looks up."""
    made.append(word)
    if word == "bad":
        raise LookupError(word)
    return word.upper()


@pytest.fixture(autouse=True)
def none_made() -> None:
    made.clear()


async def call(folder: Path, called: Tool, *words: str) -> list[CallResult]:
    with Journal(folder / "calls.jsonl", RecordedCall) as journal:
        async with ReplayedCalls(ToolSettings(), journal) as calls:
            return [await calls.call(called, {"word": word}) for word in words]


async def test_equal_calls_are_made_once_also_by_a_later_probe(tmp_path: Path) -> None:
    assert await call(tmp_path, tool(look), "a", "a", "b") == [CallResult(text) for text in "AAB"]
    assert await call(tmp_path, tool(look), "b", "c") == [CallResult("B"), CallResult("C")]
    assert made == ["a", "b", "c"]


async def test_failed_calls_and_tools_that_say_so_are_called_each_time(tmp_path: Path) -> None:
    assert all(result.failed for result in await call(tmp_path, tool(look), "bad", "bad"))
    await call(tmp_path, tool(look, replay=False), "a", "a")
    assert made == ["bad", "bad", "a", "a"]


CALLING = """
from pydantic import BaseModel
from metier.agents import Role, ScriptedBackend, Task, TaskGraph, TaskSet, ToolCall, ToolCalls

class Line(BaseModel):
    text: str

def look(word: str) -> str:
    "Looks up."
    with open("looked", "a") as file:
        file.write(word)
    return word

graph = TaskGraph("g", takes=Line, gives=str)
graph.step(Role("writer", takes=Line, gives=str, tools=[look]))
verifiers = {"writer": lambda task, answer: float(answer == "looked up")}

def tasks(split, size, seed):
    made = tuple(Task(str(i), Line(text=str(i)), key=i) for i in range(size))
    return TaskSet("lines", "tune", made, lambda task, output: float(output == "looked up"))

CALL = ToolCalls(tool_calls=(ToolCall(name="look", arguments={"word": "w"}),))

def scripted():
    return ScriptedBackend({"writer": lambda ask: '"looked up"' if len(ask.messages) > 2 else CALL})
"""


async def test_answers_are_verified_and_calls_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calling.py").write_text(CALLING)
    options = ProbeOptions(workflow=str(tmp_path / "calling.py"), tasks="tune:3", variants=("base",), engine="scripted")
    async with open_trials(options, tmp_path / "trials") as trials:
        tasks = trials.file.tasks("tune:3")
        everyone = trials.space.uniform(Candidate("base"))
        outcomes = await trials.evaluator(tasks).outcomes(everyone, ["0"])
        outcomes += await trials.evaluator(tasks).outcomes(everyone, ["1", "2"])
    assert [outcome.role_scores for outcome in outcomes] == [{"writer": 1.0}] * 3
    assert (tmp_path / "looked").read_text() == "w"
