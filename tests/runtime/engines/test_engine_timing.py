"""Timing an engine on the base at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.runtime.engines.engine_timing import time_engine

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_engine_of_each_type_is_timed(tiny_base: Path, anyio_backend: str) -> None:
    for dtype in ("float32", "bfloat16"):
        timing = await time_engine(tiny_base, dtype=dtype, threads=1)
        assert (timing.dtype, timing.threads) == (dtype, 1)
        assert timing.seconds > 0
        assert timing.cpu_s > 0
