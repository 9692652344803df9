"""LangGraph and pydantic-ai against a metier server, in their own environment: `make clients`, not `make test`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from metier.agents import ScriptedBackend
from metier.agents.graphs.workflow_file import load_workflow
from metier.runtime.server.served_models import ServedWorkflow
from tests.runtime.served import server

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients/bin/python"

pytestmark = pytest.mark.clients


def call(example: str, *arguments: str) -> str:
    """What an example prints, run by the clients' own Python."""
    command = [str(PYTHON), str(ROOT / "examples/clients" / example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
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
