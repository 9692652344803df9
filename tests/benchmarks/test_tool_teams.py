"""The benchmark of teams with tools: its arms are whole, and its table says what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tool_teams

from metier.agents.graphs.workflow_file import load_workflow


@pytest.mark.parametrize("team", tool_teams.TEAMS)
def test_each_arm_assigns_all_roles_and_has_its_tasks(team: str) -> None:
    for arm in tool_teams.ARMS.values():
        file = load_workflow(tool_teams.workflow_of(team, arm))
        assert set(tool_teams.assignment_of(team, arm).roles) == set(file.graph.roles())
        assert any(role.tools for role in file.graph.roles().values()) == arm.has_tool
        assert len(file.tasks(tool_teams.TASKS)) == tool_teams.BLOCKS * tool_teams.BLOCK_TASKS


def test_wilsons_interval() -> None:
    assert tool_teams.wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert tool_teams.wilson(0, 100) == pytest.approx((0.0, 0.037), abs=1e-3)
    assert tool_teams.wilson(100, 100) == pytest.approx((0.963, 1.0), abs=1e-3)


def test_the_table_pairs_arms_task_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    def row(arm: str, block: int, score: float) -> dict[str, Any]:
        runs = [{"task": f"{block}-{n}", "score": score, "calls": 1, "asks": 3, "written": 9} for n in range(60)]
        return {"team": "ask_database", "arm": arm, "content": arm, "block": block, "runs": runs, "cpu_s": 50.0,
                "wall_s": 25.0, "others": 0.5}  # fmt: skip

    rows = [row("tool, trained", block, 1.0) for block in range(2)]
    rows += [row("no tool, trained", block, float(block == 0)) for block in range(2)]
    rows += [row("tool, untrained", 0, 0.0)]
    tool_teams.show("ask_database", rows)
    said = capsys.readouterr().out
    assert "| tool, trained | 120 | 100.0 (96.9-100.0) | 1.00 | 3.00 | 9.0 | 0.833 | 0.42 | 50% |" in said
    assert "tool, trained minus no tool, trained: +50.0 points (+" in said
    assert "| tool, untrained | 60 | 0.0 (0.0-6.0) |" in said
    assert "tool, trained minus tool, untrained: +100.0 points (+100.0 to +100.0)" in said
