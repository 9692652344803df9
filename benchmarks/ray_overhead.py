"""What an ask costs more on Ray than on a supervised engine: CPU-milliseconds of the driver and all its processes.

    python benchmarks/ray_overhead.py --rounds 5

A tiny random model, 8 tokens an ask, 16 asks at a time, one replica. Both engines are open all the while and take
turns, so that what Ray's processes do when idle is counted on both sides; it is measured too. Bar: at most 5 CPU-ms an
ask.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import anyio
import psutil

from metier.agents import Ask, Message
from metier.runtime import Session, open_session
from metier.runtime.settings.session import load_settings

AT_ONCE = 16
IDLE_S = 5.0
TEXT = "How many legs do three dogs, two spiders and one duck have in total?"


def tree_cpu_s() -> float:
    """CPU-seconds of this process and every one started from it."""
    this = psutil.Process()
    total = 0.0
    for process in [this, *this.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


async def asks(session: Session, count: int) -> tuple[float, float, float]:
    """CPU-seconds of `count` asks: of all processes, of the engines as they say themselves, and the wall time."""
    messages, left = (Message(role="user", content=TEXT),), iter(range(count))

    async def ask() -> None:
        for number in left:
            await session.ask(Ask(run_id="b", step_path=str(number), role="writer", messages=messages, max_tokens=8))

    engine_s = sum(row["cpu_s"] for row in session.engine_totals().values())
    began_s, began_cpu_s = time.monotonic(), tree_cpu_s()
    async with anyio.create_task_group() as tasks:
        for _ in range(AT_ONCE):
            tasks.start_soon(ask)
    cpu_s, wall_s = tree_cpu_s() - began_cpu_s, time.monotonic() - began_s
    return cpu_s, sum(row["cpu_s"] for row in session.engine_totals().values()) - engine_s, wall_s


async def measure(rounds: int, count: int) -> None:
    """Run the rounds and print the differences."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.tiny_model import write_tiny_llama

    overrides = {"eager": True, "kv_cache_mib": 64, "max_model_tokens": 512, "threads": 1, "max_running": AT_ONCE}
    engine = {f"engine.{name}": value for name, value in overrides.items()}
    settings = load_settings(overrides=engine | {"ray.replicas": 1, "ray.pin_cores": False})
    more_ms, wall_ms = [], []
    with tempfile.TemporaryDirectory() as folder:
        base = write_tiny_llama(Path(folder) / "tiny")
        async with (
            open_session(base=base, engine="supervised", store=":memory:", settings=settings) as supervised,
            open_session(base=base, engine="ray", store=":memory:", settings=settings) as on_ray,
        ):
            await asks(supervised, 50)
            await asks(on_ray, 50)
            began_s = tree_cpu_s()
            await anyio.sleep(IDLE_S)
            idle = (tree_cpu_s() - began_s) / IDLE_S
            for number in range(rounds):
                order = (supervised, on_ray) if number % 2 else (on_ray, supervised)
                took = {session: await asks(session, count) for session in order}
                (one_s, one_engine_s, one_wall_s), (two_s, two_engine_s, two_wall_s) = took[supervised], took[on_ray]
                more_ms.append(1000 * (two_s - one_s) / count)
                wall_ms.append(1000 * (two_wall_s - one_wall_s) / count)
                one, two = (
                    (1000 * one_s / count, 1000 * one_engine_s / count),
                    (
                        1000 * two_s / count,
                        1000 * two_engine_s / count,
                    ),
                )
                print(
                    f"round {number + 1}  supervised {one[0]:6.2f} (engine {one[1]:.2f})  "
                    f"ray {two[0]:6.2f} (engine {two[1]:.2f}) CPU-ms an ask",
                    flush=True,
                )
    print(f"\nRay costs {median(more_ms):.2f} CPU-ms more an ask ({min(more_ms):.2f} to {max(more_ms):.2f}),")
    print(f"{median(wall_ms):.2f} ms more wall time for each of {count} asks, {AT_ONCE} at a time;")
    print(f"idle, all processes of both take {1000 * idle:.0f} CPU-ms a second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--asks", type=int, default=400)
    given = parser.parse_args()
    anyio.run(measure, given.rounds, given.asks)
