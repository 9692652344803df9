"""What the README shows works: its example runs, its commands and files exist."""

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


def blocks(language: str) -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(ask: Ask) -> dict[str, Any]:
        return {"planner": {"expression": "3*4+2*2"}, "solver": {"value": 16}, "critic": {"correct": True}}[ask.role]

    opened = partial(metier.runtime.open_session, backend=ScriptedBackend(default=reply), store=":memory:")
    monkeypatch.setattr(metier.runtime, "open_session", opened)
    exec(compile(blocks("python")[0], "README.md", "exec"), {"__name__": "readme"})
    assert "value=16" in capsys.readouterr().out


def test_the_assignment_is_one() -> None:
    assert Assignment.model_validate(yaml.safe_load(blocks("yaml")[0])).names() == [None, "planner", "solver"]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", README, re.M))
    assert named <= targets


def test_the_thirty_lines_stay_thirty() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 36
