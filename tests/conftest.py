"""Fixtures that all rooms share."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tiny_families import write_tiny_family

# Tiny models are no faster on two threads, and on a busy machine threads that wait for each other take minutes.
# Engines take the number of their settings.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Portable code is tested on both event loops."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the tiny random checkpoint of a family by its name in `tests.tiny_families.FAMILIES`; written once."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def write(name: str) -> Path:
        return write_tiny_family(root / name, name)

    return write
