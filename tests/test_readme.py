"""What README and docs show works: the example runs, the workflow can be built, YAML can be loaded."""

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
from metier.runtime import Settings
from metier.specializers import Recipe
from metier.specializers.recipes.recipe import Acceptance

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def blocks(language: str, page: Path = README) -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(ask: Ask) -> dict[str, Any]:
        return {"planner": {"expression": "3*4+2*2"}, "solver": {"value": 16}, "critic": {"correct": True}}[ask.role]

    opened = partial(metier.runtime.open_session, backend=ScriptedBackend(default=reply), store=":memory:")
    monkeypatch.setattr(metier.runtime, "open_session", opened)
    exec(compile(blocks("python")[0], "README.md", "exec"), {"__name__": "readme"})
    assert "value=16" in capsys.readouterr().out


def test_the_workflow_of_the_docs_can_be_built() -> None:
    shown: dict[str, Any] = {"__name__": "workflows"}
    exec(compile(blocks("python", DOCS / "workflows.md")[0], "workflows.md", "exec"), shown)
    assert sorted(shown["graph"].build().roles()) == ["critic", "solver"]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_the_yaml_that_pages_show_can_be_loaded(page: Path) -> None:
    for block in blocks("yaml", page):
        content = yaml.safe_load(block)
        if "roles" in content:
            Assignment.model_validate(content)
        elif "methods" in content:
            Recipe.model_validate(content)
        elif "accept" in content:
            Acceptance.model_validate(content["accept"])
        else:
            Settings(**content)


def test_the_thirty_lines_stay_thirty() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 36
