"""What a request costs through `metier serve` beside the embedded call: CPU-milliseconds of the server's process.

    python benchmarks/server_overhead.py --rounds 5                 # a backend that answers at once
    python benchmarks/server_overhead.py --rounds 5 --engine        # a tiny random model in vLLM, 8 tokens an ask

The client is a process of its own, so that its CPU time is not the server's; 16 requests go on at a time on both sides.
Each round asks the same things by the session and by HTTP, in turns; the difference per request is what is reported.
Bar: at most 3 CPU-ms a request.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from harness import Samples, arguments, clocked, machine, paired_rounds, spread
from pydantic import BaseModel

from metier.agents import Ask, Message, Role, ScriptedBackend, TaskGraph
from metier.runtime import Session, open_session
from metier.runtime.server.app import make_app
from metier.runtime.server.served_models import ServedWorkflow
from metier.runtime.server.serving import listen_on, loop_options, new_server
from metier.runtime.settings.session import load_settings

AT_ONCE = 16
TEXT = "How many legs do three dogs, two spiders and one duck have in total?"
CLIENT = """
import asyncio, sys, httpx
url, text, (count, at_once, stream, tokens) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
body = {"model": "base", "messages": [{"role": "user", "content": text}], "max_completion_tokens": tokens,
        "stream": bool(stream)}
async def main():
    left = iter(range(count))
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        async def ask():
            for _ in left:
                (await client.post("/v1/chat/completions", json=body)).raise_for_status()
        await asyncio.gather(*(ask() for _ in range(at_once)))
for line in sys.stdin:
    asyncio.run(main())
    print("done", flush=True)
"""


class Puzzle(BaseModel):
    text: str


graph = TaskGraph("one", takes=Puzzle, gives=str)
graph.step(Role("writer", takes=Puzzle, gives=str))


async def embedded(session: Session, count: int, stream: bool, tokens: int) -> float:
    """CPU-seconds of `count` asks by the session."""
    messages = (Message(role="user", content=TEXT),)
    left = iter(range(count))
    pieces: list[str] = []

    async def ask() -> None:
        for number in left:
            wanted = Ask(run_id="bench", step_path=str(number), role="writer", messages=messages, max_tokens=tokens)
            await session.ask(wanted, on_text=pieces.append if stream else None)

    with clocked() as spent:
        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(ask)
    return spent.cpu_s


class Client:
    """A client in a process of its own that asks `count` times at each command."""

    def __init__(self, url: str, count: int, stream: bool, tokens: int) -> None:
        arguments = [url, TEXT, str(count), str(AT_ONCE), str(int(stream)), str(tokens)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    async def go(self) -> float:
        """CPU-seconds of this process while the client asks."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with clocked() as spent:
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()
            said = await asyncio.to_thread(self._process.stdout.readline)
        assert said == b"done\n", "the client has failed"
        return spent.cpu_s

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _engine_s(session: Session) -> float:
    """CPU-seconds of the engines: requests that come one by one make smaller batches, and more steps."""
    return float(sum(totals["cpu_s"] for totals in session.engine_totals().values()))


@asynccontextmanager
async def open_served(engine: bool, folder: Path) -> AsyncGenerator[Session]:
    """A session on a backend that answers at once, or on a tiny random model."""
    overrides: dict[str, Any] = {"server.drain_s": 1}
    if not engine:
        backend = ScriptedBackend(default=lambda ask: "one two three four five six seven eight", keep_asks=False)
        settings = load_settings(overrides=overrides)
        async with open_session(backend=backend, store=":memory:", settings=settings) as session:
            yield session
        return
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.tiny_model import write_tiny_llama

    tiny = {"eager": True, "kv_cache_mib": 64, "max_model_tokens": 512, "threads": 1}
    settings = load_settings(overrides=overrides | {f"engine.{name}": value for name, value in tiny.items()})
    base = write_tiny_llama(folder / "tiny")
    async with open_session(base=base, store=":memory:", settings=settings) as session:
        await session.start_engines()
        yield session


@dataclass(frozen=True)
class Took:
    """CPU milliseconds a request: of this process, and of it outside the engine."""

    cpu_ms: float
    outside_ms: float


async def measure(rounds: int, count: int, engine: bool, tokens: int, journal: Path | None) -> None:
    """Run the rounds and print a row for whole replies and one for streams."""
    with tempfile.TemporaryDirectory() as folder, listen_on("127.0.0.1", 0) as listening:
        async with open_served(engine, Path(folder)) as session, anyio.create_task_group() as tasks:
            app = make_app(session, [ServedWorkflow(graph.build())])
            server = new_server(app, session.settings.server)
            tasks.start_soon(server.serve, [listening])
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            print(machine())
            print(f"{'tiny model' if engine else 'scripted'}, {count} requests a round, {AT_ONCE} at a time")
            for stream in (False, True):
                client = Client(url, count, stream, tokens)
                ways: dict[str, Callable[[], Awaitable[float]]] = {
                    "embedded": partial(embedded, session, count, stream, tokens),
                    "server": client.go,
                }
                took: Samples[str, Took] = Samples(list(ways), journal)
                for number, name in paired_rounds(list(ways), rounds):
                    engine_s = _engine_s(session)
                    cpu_s = await ways[name]()
                    engine_s = _engine_s(session) - engine_s
                    took.keep(number, name, Took(cpu_s / count * 1e3, (cpu_s - engine_s) / count * 1e3))
                client.close()
                alone = spread(took.values("embedded", lambda one: one.cpu_ms))
                more, outside = (
                    spread(took.differences("server", "embedded", of), "+.2f")
                    for of in (lambda one: one.cpu_ms, lambda one: one.outside_ms)
                )
                print(
                    f"{'stream' if stream else 'whole reply':12} embedded {alone} CPU-ms; through the server {more}, "
                    f"of which outside the engine {outside}, bar 3"
                )
            server.handle_exit(15, None)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--tokens", type=int, default=8)
    given = parser.parse_args()
    wanted = (given.rounds, given.count, given.engine, given.tokens, given.journal)
    anyio.run(measure, *wanted, backend_options=loop_options())


if __name__ == "__main__":
    main()
