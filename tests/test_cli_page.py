"""docs/cli.md is what the commands say of themselves, and every example in it can be typed."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from metier.runtime.cli.main import app

ROOT = Path(__file__).parents[1]


def script() -> ModuleType:
    """scripts/write_cli_page.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("write_cli_page", ROOT / "scripts" / "write_cli_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = script()
COMMANDS: dict[str, Any] = dict(PAGE._commands(typer.main.get_command(app), "metier"))


def test_the_page_is_what_the_script_writes() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == PAGE.cli_page(), "run: python scripts/write_cli_page.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_an_example(name: str) -> None:
    """That its verbs and options exist, test_docs.py checks in the page."""
    examples = PAGE.examples(COMMANDS[name])
    assert examples and all(example.startswith(name) for example in examples)
    files = [word for example in examples for word in shlex.split(example) if word.startswith("examples/")]
    assert all((ROOT / file).exists() for file in files)


def test_an_option_that_several_commands_have_means_the_same_in_each() -> None:
    said: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            for option in parameter.opts:
                said.setdefault(option, set()).add(parameter.help or "")
    for shared in ("--shelf", "--base", "--engine", "--set", "--settings", "--store", "--assignment", "--tasks"):
        assert len(said[shared] - {"How many puzzles."}) == 1, said[shared]
    assert all("Names, comma-separated; may be repeated." in text for text in said["--variants"])
    assert "--also" not in said and "--mix" not in said
