"""What a run thought is in its traffic, as training rows tell it: text, the empty text for off, None for nothing."""

from __future__ import annotations

import pytest

from metier.agents import ScriptedBackend
from metier.agents.thinking import THINKING_OFF, ThinkingProfile
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, open_session
from tests.agents.workflow import Puzzle, solve_and_check

pytestmark = pytest.mark.anyio


async def test_traffic_tells_thinking_off_from_nothing_said() -> None:
    backend = ScriptedBackend(
        {
            "planner": lambda ask: '<think>one and two</think>{"expression": "1+2"}',
            "solver": lambda ask: '<think>three</think>{"value": 3}',
            "critic": lambda ask: {"correct": True},
        }
    )
    assignment = Assignment(
        roles={
            "planner": RoleAssignment(thinking=ThinkingProfile(max_tokens=8)),
            "solver": RoleAssignment(thinking=THINKING_OFF),
        }
    )
    with RunStore(":memory:") as store:
        async with open_session(backend=backend, store=store, assignment=assignment) as session:
            await session.run(solve_and_check()[0], Puzzle(text="x"))
        assert {row.role: row.thinking for row in store.traffic()} == {
            "planner": "one and two",
            "solver": "",
            "critic": None,
        }
