"""docs/your-first-workflow.md: its blocks are the files that `metier new` writes, its commands run in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from metier.agents import SettingsError
from metier.agents.graphs.workflow_file import load_workflow
from metier.router import load_assignment
from metier.runtime.cli.new import recipe_text, workflow_text
from tests.runtime.cli.test_answers import folder, metier
from tests.test_readme import DOCS, blocks

__all__ = ["folder"]

PAGE = DOCS / "your-first-workflow.md"
MOST_LINES = 50
LIGHTER = {"size: 300": "size: 6", "steps: 60": "steps: 2", "warmup_steps: 4": "warmup_steps: 1"}


def lines(text: str) -> list[str]:
    """Lines that hold something."""
    return [line for line in text.splitlines() if line.strip()]


def test_the_blocks_of_the_page_are_the_files_that_are_written() -> None:
    assert [line for block in blocks("python", PAGE) for line in lines(block)] == lines(workflow_text())
    assert blocks("yaml", PAGE) == [recipe_text("people")]
    assert len(lines(workflow_text())) <= MOST_LINES


def test_every_command_of_the_page_runs(folder: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is real, on a tiny model; in place of an engine the file's own `scripted` answers."""
    monkeypatch.setenv("METIER_SHELF", str(folder / "shelf"))
    commands = [shlex.split(line)[1:] for line in re.findall(r"^    (metier .*)$", PAGE.read_text("utf-8"), re.M)]
    assert [words[0] for words in commands] == (
        "new run graph make probe assign run show report run".split()
    )  # fmt: skip
    said = []
    for words in commands:
        if words[0] == "make":
            recipe = (folder / "people.yaml").read_text()
            for given, lighter in LIGHTER.items():
                recipe = recipe.replace(given, lighter)
            (folder / "people.yaml").write_text(recipe)
            words += ["--base", str(tiny_base)]
        elif words[0] in ("run", "probe") and "--engine" not in words:
            words += ["--engine", "scripted"]
        elif words[0] == "assign":
            words += ["--minimise", "tokens"]  # a fake measures no CPU-seconds
        said.append(metier(*words))
    assert "24 of 24" in said[1].stdout and "flowchart" in said[2].stdout
    assert set(load_assignment(folder / "team.yaml").roles) == {"extractor", "normaliser", "verifier"}
    assert "| team | 24 | 24 of 24 |" in said[6].stdout
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert said[-1].stdout == '{"name":"Ann Adams","age":42}\n'


def test_the_teacher_teaches_each_role_and_also_to_disagree(folder: Path) -> None:
    metier("new", "people")
    module = load_workflow("people.py")._module
    rows = list(module.rows(size=3, seed=0))
    assert [row.role for row in rows[:4]] == ["extractor", "normaliser", "verifier", "verifier"]
    assert [row.reply for row in rows[2:4]] == ['{"ok":true}', '{"ok":false}'] and len(rows) == 12
    assert yaml.safe_load((folder / "people.yaml").read_text())["data"]["program"] == "people.py:rows"


def test_nothing_is_written_over(folder: Path) -> None:
    (folder / "people.yaml").write_text("mine")
    with pytest.raises(SettingsError, match="people.yaml exists; expected a new file"):
        metier("new", "people")
    assert [path.name for path in folder.iterdir()] == ["people.yaml"]
    for name in ("../people", "my people", "people.py", ""):
        with pytest.raises(SettingsError, match="no name for a workflow"):
            metier("new", name)
