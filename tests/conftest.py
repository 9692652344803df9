"""Fixtures that all rooms share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Portable code is tested on both event loops."""
    return str(request.param)
