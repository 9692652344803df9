"""What an ask costs more on Ray than on a supervised engine: CPU-milliseconds of the driver and all its processes.

    python benchmarks/ray_overhead.py --rounds 5

A tiny random model, 8 tokens an ask, 16 asks at a time, one replica. Both engines are open all the while and take
turns, so that what Ray's processes do when idle is counted on both sides; it is measured too. Bar: at most 5 CPU-ms an
ask.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import anyio
from harness import Samples, arguments, clocked, machine, paired_rounds, spread, tree_cpu_s

from metier.agents import Ask, Message
from metier.runtime import Session, open_session
from metier.runtime.settings.session import load_settings

AT_ONCE = 16
IDLE_S = 5.0
TEXT = "How many legs do three dogs, two spiders and one duck have in total?"


@dataclass(frozen=True)
class Asked:
    """Milliseconds an ask: CPU of all processes, of the engines as they say themselves, and wall."""

    cpu_ms: float
    engine_ms: float
    wall_ms: float


async def asks(session: Session, count: int) -> Asked:
    """What `count` asks take."""
    messages, left = (Message(role="user", content=TEXT),), iter(range(count))

    async def ask() -> None:
        for number in left:
            await session.ask(Ask(run_id="b", step_path=str(number), role="writer", messages=messages, max_tokens=8))

    engine_s = sum(row["cpu_s"] for row in session.engine_totals().values())
    with clocked(tree_cpu_s) as spent:
        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(ask)
    engine_s = sum(row["cpu_s"] for row in session.engine_totals().values()) - engine_s
    return Asked(*(1000 * seconds / count for seconds in (spent.cpu_s, engine_s, spent.wall_s)))


async def measure(rounds: int, count: int, journal: Path | None) -> None:
    """Run the rounds and print the differences."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.tiny_model import write_tiny_llama

    overrides = {"eager": True, "kv_cache_mib": 64, "max_model_tokens": 512, "threads": 1, "max_running": AT_ONCE}
    engine = {f"engine.{name}": value for name, value in overrides.items()}
    settings = load_settings(overrides=engine | {"ray.replicas": 1, "ray.pin_cores": False})
    with tempfile.TemporaryDirectory() as folder:
        base = write_tiny_llama(Path(folder) / "tiny")
        async with (
            open_session(base=base, engine="supervised", store=":memory:", settings=settings) as supervised,
            open_session(base=base, engine="ray", store=":memory:", settings=settings) as on_ray,
        ):
            sessions = {"supervised": supervised, "ray": on_ray}
            for session in sessions.values():
                await asks(session, 50)
            with clocked(tree_cpu_s) as idle:
                await anyio.sleep(IDLE_S)
            took: Samples[str, Asked] = Samples(list(sessions), journal)
            for number, name in paired_rounds(list(sessions), rounds):
                one = took.keep(number, name, await asks(sessions[name], count))
                print(
                    f"round {number}  {name} {one.cpu_ms:6.2f} CPU-ms an ask (engine {one.engine_ms:.2f})", flush=True
                )
    more, longer = (
        took.differences("ray", "supervised", of) for of in (lambda one: one.cpu_ms, lambda one: one.wall_ms)
    )
    print(f"\n{machine()}\nRay costs {spread(more)} CPU-ms more an ask,")
    print(f"{spread(longer)} ms more wall time for each of {count} asks, {AT_ONCE} at a time;")
    print(f"idle, all processes of both take {1000 * idle.cpu_s / IDLE_S:.0f} CPU-ms a second")


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--asks", type=int, default=400)
    given = parser.parse_args()
    anyio.run(measure, given.rounds, given.asks, given.journal)
