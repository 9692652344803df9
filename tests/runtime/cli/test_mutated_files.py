"""No file that people write ends in a traceback: it is taken, or refused by a named error that says which file."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metier.agents.errors import MetierError, SettingsError
from metier.agents.graphs.workflow_file import load_workflow
from metier.router import load_assignment
from metier.runtime.cli.options import overrides
from metier.runtime.settings.session import load_settings
from metier.specializers import Shelf, load_recipe
from tests.mutated_text import mutated

SEED = 20
RECIPE = """name: solver
parent: base
seed: 3
data:
  program: puzzles.py:solver_rows
  size: 600
methods:
  - method: lora
    rank: 8
    targets: [q_proj, v_proj]
  - {method: ptq}
accept:
  role: puzzles.py:solver
  data: {traffic: rows.jsonl, min_score: 0.5}
  margin: 0.02
"""
ASSIGNMENT = """default: base
roles:
  planner: planner-lora
  solver: {variant: solver-lora, rounds: {2: base}, reason: second tries are short}
  writer: {ladder: [{thinking: 64}, {thinking: 256}], climb_on: [rejected]}
  critic: {thinking: off, thinking_rounds: {2: 64, 3: {max_tokens: 128, min_tokens: 32, waits: 1}}}
"""
SETTINGS = """concurrency: 4
shelf: variants
engine:
  kv_cache_mib: 256
  threads: 2
fleet:
  servers:
    - {url: "http://127.0.0.1:8000"}
limits: {max_tokens: 100}
server: {watchers: 10}
"""
WORKFLOW = """from pydantic import BaseModel
from metier.agents import Role, ScriptedBackend, Task, TaskGraph, TaskSet
class Question(BaseModel):
    text: str
class Answer(BaseModel):
    value: int
solver = Role("solver", takes=Question, gives=Answer)
graph = TaskGraph("one", takes=Question, gives=Answer)
graph.step(solver)
"""
VARIANT = """{
  "schema_version": 1,
  "id": "0123456789abcdef",
  "name": "solver",
  "base": "fedcba9876543210",
  "parent": null,
  "recipe": {"methods": [{"method": "lora"}]},
  "seed": 0,
  "prompt_layout": 1,
  "engine": {"base": "fedcba9876543210", "weights": "base"},
  "ask": {"adapter": "lora", "rank": 8},
  "files": {},
  "card": {"loss": 0.5, "role": "solver", "quality": 0.5, "quality_before": 0.4, "compared_with": "base",
    "cpu_ms_per_ask": 4.0, "cpu_ms_per_ask_before": 5.0}
}
"""


def set_each(path: Path) -> object:
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    return [load_settings(None, overrides([line])) for line in text.splitlines() if not line.startswith(" ")]


def listed(path: Path) -> object:
    shelf = Shelf(path.parent.parent)
    for _, error in shelf.damaged():
        raise error
    from metier.runtime.cli.make import list_variants

    return list_variants(shelf, True)


KINDS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "recipe": ("recipe.yaml", RECIPE, load_recipe),
    "assignment": ("assignment.yaml", ASSIGNMENT, load_assignment),
    "settings": ("settings.yaml", SETTINGS, load_settings),
    "--set": ("sets", SETTINGS.replace(": ", "="), set_each),
    "workflow": ("flow.py", WORKFLOW, lambda path: load_workflow(str(path))),
    "variant": ("one/variant.json", VARIANT, listed),
}


def told(kind: str, path: Path, load: Callable[[Path], Any]) -> str | None:
    """What a loader says of a file, None where it takes it; anything but a named error is the test's failure."""
    try:
        load(path)
    except MetierError as error:
        text = str(error)
        assert kind in ("--set", "variant") or path.name in text, f"does not name the file: {text}"
        assert len(text) < 4000
        text.encode("utf-8")
        return text
    return None


def campaign(folder: Path, kind: str, count: int) -> int:
    """Load `count` mutations of a kind of file, and return how many were refused."""
    name, text, load = KINDS[kind]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    if kind not in ("--set", "variant"):
        assert told(kind, path, load) is None  # the file that is mutated is a good one
    refused = 0
    for number in range(count):
        path.write_bytes(mutated(text, random.Random(f"{SEED}|{kind}|{number}")))
        try:
            refused += told(kind, path, load) is not None
        except BaseException as error:
            error.add_note(f"mutation {number} of {kind}: {path.read_bytes()[:500]!r}")
            raise
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_taken_or_refused_by_name(tmp_path: Path, kind: str) -> None:
    assert campaign(tmp_path, kind, 120) > 40


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutated_files(tmp_path: Path, kind: str) -> None:
    assert campaign(tmp_path, kind, 1700) > 600


@pytest.mark.parametrize("kind", ["recipe", "assignment", "settings", "workflow"])
def test_a_folder_a_pipe_and_nothing_are_refused(tmp_path: Path, kind: str) -> None:
    name, _, load = KINDS[kind]
    path = tmp_path / name
    assert told(kind, path, load) is not None
    os.mkfifo(path)
    assert told(kind, path, load) is not None
    path.unlink()
    path.mkdir()
    assert told(kind, path, load) is not None


def test_a_setting_that_is_no_value_is_named() -> None:
    with pytest.raises(SettingsError, match=r"--set concurrency='\['.*cannot be read"):
        overrides(["concurrency=["])
