"""A wheel carries the demo: built, installed into an environment that knows no checkout, run in an empty folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
MOST_WHEEL_MB = 15
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of the build stays in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for room in ("agents", "specializers", "router", "runtime", "examples"):
        shutil.copytree(ROOT / room, folder / "source" / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "source" / file)
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_demo_and_no_other_adapter(wheel: Path) -> None:
    held = {name.removeprefix("metier/examples/") for name in ZipFile(wheel).namelist() if "/examples/" in name}
    assert {"solve_and_check.py", "puzzles.py", "assignment.yaml"} < held
    assert {name for name in held if name.startswith("recipes/")} == {
        "recipes/planner.yaml", "recipes/solver.yaml", "recipes/critic.yaml",
    }  # fmt: skip
    adapters = {name.split("/")[1] for name in held if name.startswith("variants/")}
    assert adapters == {"planner", "solver", "critic"}
    assert wheel.stat().st_size < MOST_WHEEL_MB * 1e6


def test_every_module_is_in_it(wheel: Path) -> None:
    held = set(ZipFile(wheel).namelist())
    for room in ("agents", "specializers", "router", "runtime"):
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".cpp", ".j2", ".css", ".html"):
                assert f"metier/{path.relative_to(ROOT)}" in held


def test_the_demo_finds_its_files_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """As far as it goes without an engine: its workflow has no fake, which it says after it has read everything."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = place / "lib" / version / "site-packages"
    # What metier needs is taken from here, without the hook that finds this checkout.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = _installer(place / "bin" / "python")
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def metier(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(place / "bin" / "metier"), *words]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)

    folder = packages / "metier" / "examples"
    shown = metier("demo", "--tasks", "3", "--engine", "scripted")
    assert "3 puzzles from seeds" in shown.stderr, shown.stderr
    assert f"Workflow, recipes and adapters: {folder}\n" in shown.stderr
    assert "GraphError" in shown.stderr and "defines no `scripted`" in shown.stderr
    listed = metier("variants", "--shelf", str(folder / "variants"), "--set", "shelf=none", "--verify")
    assert listed.returncode == 0 and "3 variants verified" in listed.stderr, listed.stderr
    graph = metier("graph", str(folder / "solve_and_check.py"))
    assert "critic" in graph.stdout


def _installer(python: Path) -> list[str]:
    """What installs a wheel into an environment without a registry: uv where it is, else pip."""
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "-q", "--offline", "--no-deps", "--python", str(python)]
    if importlib.util.find_spec("pip") is None:
        pytest.skip("neither uv nor pip is here")
    return [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps"]
