"""Clients of others against a metier server, in their own environment: `make clients`, not `make test`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from metier.agents import Ask, ScriptedBackend
from metier.agents.answers.sample_answer import sample_answer
from metier.agents.graphs.workflow_file import load_workflow
from metier.runtime.server.served_models import ServedWorkflow
from tests.runtime.served import server

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients/bin/python"

pytestmark = pytest.mark.clients


def call(example: str, *arguments: str) -> str:
    """What an example prints, run by the clients' own Python."""
    command = [str(PYTHON), str(ROOT / "examples/clients" / example), *arguments]
    # From elsewhere: a client's own `agents` must not be ours.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=PYTHON.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def team() -> ScriptedBackend:
    """Solves every puzzle; its critic is content with the second answer only."""
    verdicts = iter([False] + [True] * 99)
    return ScriptedBackend(
        {
            "planner": lambda ask: {"expression": "3*4+2*2"},
            "solver": lambda ask: {"steps": "12+4", "value": 16},
            "critic": lambda ask: {"correct": next(verdicts), "why": "look again"},
        }
    )


def workflows() -> list[ServedWorkflow]:
    return [ServedWorkflow(load_workflow(str(ROOT / "examples/solve_and_check.py")).graph)]


def test_a_langgraph_program_plays_the_roles_of_a_server() -> None:
    backend = team()
    with server(backend, workflows=workflows()) as served:
        printed = json.loads(call("langgraph_team.py", f"{served.url}/v1"))
    assert printed == {"answer": {"steps": "12+4", "value": 16}, "rounds": 2}
    assert [ask.role for ask in backend.asks] == ["planner", "solver", "critic"] * 2
    # The planner of the second round has heard the critic, in the role's own prompt.
    assert "look again" in backend.asks[3].messages[-1].content


def test_pydantic_ai_agents_are_roles_and_workflows_of_a_server() -> None:
    with server(team(), workflows=workflows()) as served:
        printed = json.loads(call("pydantic_ai_agents.py", f"{served.url}/v1"))
    assert printed["plan"] == {"expression": "3*4+2*2"}
    assert printed["answer"] == printed["workflow"] == {"steps": "12+4", "value": 16}
    assert printed["input_tokens"] > 0


def test_a_function_and_a_runnable_of_others_are_steps() -> None:
    assert call("runnable_step.py") == "16 legs\n"


def weather(ask: Ask) -> Any:
    """Calls the first tool that it is offered, then says what that found, or gives it to the last tool."""
    schema, heard = ask.answer_schema, ask.messages[-1].content
    if schema is None:
        return "It is sunny."
    if "sunny in" not in heard:
        return sample_answer(schema)
    if "$defs" in schema and "answer" in schema["$defs"]:
        return json.dumps("".join(heard.partition("sunny in")[1:]))
    calls = schema["properties"]["tool_calls"]
    last = {"type": "array", "items": calls["items"]["anyOf"][-1], "minItems": 1}
    return sample_answer({**schema, "properties": {"tool_calls": last}})


PROGRAMS = {
    "openai_sdk.py": {
        "tools": "sunny in a",
        "typed": {"sunny": True},
        "response_tools": "sunny in a",
        "response_typed": {"sunny": True},
    },
    "langchain_chat.py": {"tools": "sunny in a", "typed": {"sunny": True}, "by_call": {"sunny": True}},
    "pydantic_ai_tools.py": {"typed": {"sunny": True}, "again": "It is sunny."},
    "litellm_chat.py": {"tools": "sunny in a", "typed": {"sunny": True}},
    "agents_sdk.py": {
        "tools": "sunny in a",
        "typed": {"sunny": True},
        "response_tools": "sunny in a",
        "response_typed": {"sunny": True},
    },
}
"""What they print beside the words of chats, streams and responses."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_clients_do_what_their_quick_starts_do(program: str) -> None:
    with server(ScriptedBackend(default=weather)) as served:
        printed = json.loads(call(program, f"{served.url}/v1"))
    for name in ("chat", "stream", "response", "response_stream"):
        assert printed.get(name, "It is sunny.") == "It is sunny.", name
    assert {name: printed[name] for name in PROGRAMS[program]} == PROGRAMS[program]
