"""What the README shows works: its example runs, and so does the assignment that docs/assigning.md shows."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import metier.runtime
from metier.agents import Ask, ScriptedBackend
from metier.router import Assignment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ASSIGNING = (ROOT / "docs" / "assigning.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(ask: Ask) -> dict[str, Any]:
        return {"planner": {"expression": "3*4+2*2"}, "solver": {"value": 16}, "critic": {"correct": True}}[ask.role]

    opened = partial(metier.runtime.open_session, backend=ScriptedBackend(default=reply), store=":memory:")
    monkeypatch.setattr(metier.runtime, "open_session", opened)
    exec(compile(blocks("python")[0], "README.md", "exec"), {"__name__": "readme"})
    assert "value=16" in capsys.readouterr().out


def test_the_assignment_is_one() -> None:
    shown = blocks("yaml", ASSIGNING)[0]
    assert Assignment.model_validate(yaml.safe_load(shown)).names() == [None, "critic", "planner", "solver"]


def test_the_thirty_lines_stay_thirty() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 36
