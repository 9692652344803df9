"""Fixtures that all rooms share."""

from __future__ import annotations

import os

import pytest

# Tiny models are no faster on two threads, and on a busy machine threads that wait for each other take minutes.
# Engines take the number of their settings.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Portable code is tested on both event loops."""
    return str(request.param)
