"""How fast an engine answers on this machine, in a given number type and on so many threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import anyio

from ...agents.errors import UnknownVariantError
from ...agents.messages import Ask, Message
from ...specializers.machine.measured_speed import Timing
from ..settings.engine import EngineSettings
from .pool import EnginePool

__all__ = ["time_engine"]

ASKS, ROUNDS = 8, 2
NUMBERS_READ, TOKENS_WRITTEN = 30, 24
SETTINGS = EngineSettings(eager=True, kv_cache_mib=128, max_model_tokens=512, max_running=ASKS)
"""Not compiled: that would take a minute for each kind, and the products are the same."""


async def time_engine(weights: Path, *, dtype: str, threads: int) -> Timing:
    """Answer the same asks, all at once, with an engine on the checkpoint in `weights`; the best of a few rounds.

    Raises: EngineError where the engine does not start.
    """
    settings = SETTINGS.model_copy(update={"dtype": dtype, "threads": threads})
    async with EnginePool(weights, _no_variants, settings, adapters=False) as pool:
        await pool.reply(_ask(0, 0))
        rounds = [await _round(pool, number) for number in range(1, ROUNDS + 1)]
    seconds, cpu_s = (min(values) for values in zip(*rounds, strict=True))
    return Timing(dtype=dtype, threads=threads, seconds=seconds, cpu_s=cpu_s)


async def _round(pool: EnginePool, number: int) -> tuple[float, float]:
    """Seconds in which the engine stepped, and its CPU-seconds."""
    before = _counters(pool)
    async with anyio.create_task_group() as group:
        for at in range(ASKS):
            group.start_soon(pool.reply, _ask(number, at))
    after = _counters(pool)
    return after["busy_s"] - before["busy_s"], after["cpu_s"] - before["cpu_s"]


def _ask(number: int, at: int) -> Ask:
    """Asks that no prefix cache knows: each begins with another number."""
    first = 1000 * number + 100 * at
    numbers = " ".join(str(first + step) for step in range(NUMBERS_READ))
    text = f"{numbers}: these are the houses of a long street. Write a long story about the people who live there."
    return Ask(
        run_id=f"timing-{number}-{at}",
        step_path="timing",
        role="timing",
        messages=(Message(role="user", content=text),),
        max_tokens=TOKENS_WRITTEN,
    )


def _counters(pool: EnginePool) -> dict[str, Any]:
    return next(iter(pool.totals().values()))


def _no_variants(name: str) -> NoReturn:
    raise UnknownVariantError(f"there is no variant {name!r} to time", expected="the base")
