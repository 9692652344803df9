"""The four rooms: light to import, with one sorted public list each, and no import the wrong way."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = ["metier.agents", "metier.specializers", "metier.router", "metier.runtime"]
HEAVY = {"torch", "vllm", "transformers", "peft", "reasoning_gym", "scipy"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_nothing_heavy(room: str) -> None:
    code = f"import sys, {room}; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY.isdisjoint(loaded)


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_sorted_and_there(room: str) -> None:
    module = importlib.import_module(room)
    names = module.__all__
    constants_then_classes_then_functions = sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert names == constants_then_classes_then_functions
    assert all(hasattr(module, name) for name in names)
    public = {name for name, value in vars(module).items() if not name.startswith("_") and not _is_module(value)}
    assert public == set(names)


def test_only_plugin_and_engines_know_vllm() -> None:
    """So that vLLM's next minor version is a change of these two folders; `doctor` says which version there is."""
    root = Path(__file__).parents[1]
    files = (file for room in ROOMS for file in (root / room.removeprefix("metier.")).rglob("*.py"))
    knowing = {
        str(file.parent.relative_to(root) if file.name != "doctor.py" else file.relative_to(root))
        for file in files
        if re.search(r"^\s*(from|import) vllm\b", file.read_text(encoding="utf-8"), re.M)
    }
    allowed = ("runtime/plugin", "runtime/engines", "runtime/cli/doctor.py")
    assert [folder for folder in knowing if not folder.startswith(allowed)] == []


def _is_module(value: object) -> bool:
    return type(value) is type(sys)
