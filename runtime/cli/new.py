"""`metier new`: a workflow file to start from, which runs as it is, and the recipe that trains its roles."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from ...agents.errors import SettingsError
from ..console import say
from ..output_files import can_be_written, write_output
from .demo import PACKAGE

__all__ = ["add_new_command", "recipe_text", "workflow_text"]

TEMPLATE = "first_workflow.py"
RECIPE = """name: {name}
data: {{program: {name}.py:rows, size: 300}}
methods:
  - method: lora
    rank: 8
    alpha: 16
    steps: 60
    batch_rows: 8
    warmup_steps: 4
    learning_rate: 0.003
"""


def add_new_command(app: typer.Typer) -> None:
    """Add `new` to the command line."""
    app.command(epilog="Example: `metier new people`")(new)


def new(name: Annotated[str, typer.Argument(help="Name of the new files: NAME.py and NAME.yaml.")]) -> None:
    """Write a workflow to start from, NAME.py, and the recipe that trains its roles, NAME.yaml.

    It extracts a name and an age from a sentence, normalises them and verifies them; it runs as it is, without a model.
    docs/your-first-workflow.md goes through it.
    """
    if not name.isidentifier():
        raise SettingsError(f"{name!r} is no name for a workflow", expected="letters, digits and _, such as people")
    workflow, recipe = Path(f"{name}.py"), Path(f"{name}.yaml")
    for path in (workflow, recipe):
        if path.exists():
            raise SettingsError(f"{path} exists", expected="a new file", remedy="Choose another name.")
        can_be_written(path)
    write_output(workflow, workflow_text())
    write_output(recipe, recipe_text(name))
    say(f"Try it without a model: metier run {shlex.quote(str(workflow))} --tasks test:24 --engine scripted")


def workflow_text() -> str:
    """The workflow that is written."""
    return files(PACKAGE).joinpath(TEMPLATE).read_text(encoding="utf-8")


def recipe_text(name: str) -> str:
    """The recipe that is written beside a workflow of this name."""
    return RECIPE.format(name=name)
