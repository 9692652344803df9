"""FIER's compiled operators as a processor without AVX-512 gets them: built for AVX2, and held to the same tests."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64")
def test_built_for_avx2_the_operators_compute_the_same(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/bash\nexec g++ "${@/-march=native/-march=x86-64-v3}" -Wno-psabi\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "METIER_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_fier_cpu.py")]
    done = subprocess.run(
        [*command, "-k", "operators_give or equal_scores"],
        cwd=HERE.parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 passed" in done.stdout, done.stdout  # a skip would mean that it was not built
    assert list((tmp_path / "cache").rglob("fier_cpu_kernel-*.so"))
