"""The picture of a report that docs/runs.md shows can be drawn again, from a run of any workflow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio

from metier.agents import Ask, ScriptedBackend
from metier.runtime import open_session
from metier.runtime.report import render_markdown
from tests.agents.workflow import Puzzle, solve_and_check

SCRIPT = Path(__file__).parents[2] / "scripts" / "report_picture.py"


def test_a_report_is_drawn(tmp_path: Path) -> None:
    source, picture = tmp_path / "report.md", tmp_path / "report.svg"
    source.write_text(anyio.run(a_report), encoding="utf-8")
    subprocess.run([sys.executable, SCRIPT, source, picture], check=True)
    drawn = picture.read_text(encoding="utf-8")
    assert drawn.startswith("<svg") and all(role in drawn for role in ("planner", "solver", "critic"))


async def a_report() -> str:
    """Of one run that a script answers."""

    def reply(ask: Ask) -> object:
        return {"planner": {"expression": "2+2"}, "solver": {"value": 4}, "critic": {"correct": True}}[ask.role]

    async with open_session(backend=ScriptedBackend(default=reply), store=":memory:") as session:
        await session.map(solve_and_check()[0], [Puzzle(text="two and two")])
        assert session.batch is not None
        return render_markdown(session.store, [session.batch])
