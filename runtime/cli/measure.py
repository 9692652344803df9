"""What `metier doctor --measure` does: tries number types and thread counts on a base, and keeps what it found."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from ...agents.errors import BaseModelError, EngineError, SettingsError
from ...specializers.machine.machine import this_machine
from ...specializers.machine.measured_speed import QUIET, MeasuredSpeed, Timing, note_speed
from ...specializers.machine.number_types import engine_choices
from ...specializers.machine.threads import others_busy, usable_cores
from ...specializers.shelf.base_model import base_fingerprint, find_base
from ...specializers.shelf.bundled_model import BUNDLED
from ..console import StepBar, say

__all__ = ["measure_speed"]

NO_MORE_AFTER_S = 40.0
"""After so many seconds nothing further is tried: what is known decides."""

TRAINED_IN = ("bfloat16", "float32")

TimeOne = Callable[[str, int], Awaitable[Timing]]


def measure_speed(base: str) -> MeasuredSpeed:
    """Measure engine and training on a base, keep it in the cache, and say what it comes to.

    Raises: SettingsError where there is nothing to choose, BaseModelError, EngineError where no engine starts.
    """
    folder = find_base(base, progress=say)
    base_name = base if base in BUNDLED else folder.name
    dtypes = engine_choices(folder)
    if len(dtypes) < 2:
        raise SettingsError(
            f"base {base_name!r} is computed in what vLLM chooses: there is nothing to measure",
            expected="a base that is not quantised, on a CPU",
            remedy="Measure on another base, or set engine.dtype.",
        )
    speed = anyio.run(partial(_measure, folder, base_name, dtypes))
    file = note_speed(speed)
    for what, timings in (("engines compute", speed.engine), ("training computes", speed.training)):
        if timings:
            threads = speed.threads_worth(timings)
            on = "" if threads is None else f", on {threads} of {usable_cores()} threads"
            say(f"{what} in {speed.fastest(timings)}{on}: {speed.reason(timings)}")
    say(f"kept in {file}")
    return speed


async def _measure(folder: Path, name: str, dtypes: tuple[str, ...]) -> MeasuredSpeed:
    # Training first: its libraries come before vLLM, as in `metier make`.
    from ...specializers.methods.training_timing import time_training
    from ..engines.engine_timing import time_engine

    async def train(dtype: str, threads: int) -> Timing:
        return await anyio.to_thread.run_sync(partial(time_training, folder, dtype=dtype, threads=threads))

    async def answer(dtype: str, threads: int) -> Timing:
        return await time_engine(folder, dtype=dtype, threads=threads)

    others = await anyio.to_thread.run_sync(others_busy)
    if others > QUIET:
        say(f"other programs use {others:.1f} processors: thread counts measured now count for little")
    began_s = time.monotonic()
    more = len(thread_counts()) - 1
    trainings, steps = len(TRAINED_IN) + more, len(TRAINED_IN) + len(dtypes) + 2 * more
    with StepBar(f"measuring {name}", "kinds") as bar:
        training = await _try_each(TRAINED_IN, train, bar, "training", 0, steps, began_s)
        engine = await _try_each(dtypes, answer, bar, "engine", trainings, steps, began_s)
    return MeasuredSpeed(
        machine=this_machine(),
        base=base_fingerprint(folder),
        base_name=name,
        day=time.strftime("%Y-%m-%d"),
        others=round(others, 2),
        engine=engine,
        training=training,
    )


def thread_counts() -> tuple[int, ...]:
    """One thread, half the processors that we may use, and all."""
    cores = usable_cores()
    return tuple(sorted({1, max(1, cores // 2), cores}))


async def _try_each(
    dtypes: tuple[str, ...], one: TimeOne, bar: StepBar, what: str, done: int, steps: int, began_s: float
) -> tuple[Timing, ...]:
    """Every type on one thread, then the cheaper one on more; a type that cannot be computed here is left out."""
    found: list[Timing] = []

    async def attempt(dtype: str, threads: int) -> None:
        nonlocal done
        try:
            found.append(await one(dtype, threads))
        except (EngineError, BaseModelError) as error:
            say(f"{what} in {dtype} on {threads} threads: {error}")
            if not found and dtype == dtypes[-1]:
                raise
        done += 1
        bar.show(done, steps, f"{what} in {dtype} on {threads}", *_said(found[-1:]))

    for dtype in dtypes:
        await attempt(dtype, 1)
    best = min(found, key=lambda timing: timing.cpu_s).dtype
    for threads in thread_counts()[1:]:
        if time.monotonic() - began_s < NO_MORE_AFTER_S:
            await attempt(best, threads)
    return tuple(found)


def _said(last: list[Timing]) -> Iterator[str]:
    for timing in last:
        yield f"{timing.seconds:.2f} s, {timing.cpu_s:.2f} CPU-s"
