"""What runs in each replica of a deployment: a supervised engine, asked in the words of `host_protocol`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from ...agents.errors import EngineDeadError, MetierError
from ...agents.messages import Ask, Usage
from ..engines.engine import EngineRequest
from ..engines.supervised.host_protocol import (
    Abandoned,
    Answered,
    Begin,
    Failed,
    Generate,
    Load,
    Ready,
    Swapped,
    Text,
    Unload,
    to_host,
    to_line,
)
from ..engines.supervised.supervised_engine import SupervisedEngine
from ..slots.adapter import SwapCost

__all__ = ["EngineReplica"]


class EngineReplica:
    """One replica: vLLM's AsyncLLM with our plugin in child processes, bound to cores of its own.

    `begin` is the line a supervised engine's host is started with. With `pin_cores`, replica n of a node computes on
    the n-th `threads` of the node's cores, counted from `first_core`. A replica whose engine dies fails Serve's health
    check and is replaced; a replica that dies takes its engine with it, because the host's socket closes.
    """

    # Serve awaits it: the replica is ready once its engine is.
    async def __init__(self, begin: bytes, pin_cores: bool, first_core: int) -> None:  # type: ignore[misc]
        from ray import serve

        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._owed: dict[int, Usage] = {}
        message = to_host(begin)
        assert isinstance(message, Begin)
        rank = context.rank
        assert rank is not None
        if pin_cores:
            _pin(first_core + rank.local_rank * message.settings.thread_count, message.settings.thread_count)
        self._engine = await SupervisedEngine.start(
            message.weights,
            message.settings,
            adapters=message.adapters,
            dtype=message.dtype,
            name=f"{message.name}/{rank.rank}",
        )

    async def hello(self, *, on: str) -> bytes:
        """The replica's processes as a `Ready` line, and the engine's name."""
        if on != self._id:
            return self._not_me(0, on)
        return to_line(Ready(pids=(os.getpid(), *self._engine.pids), counters=self._engine.counters()))

    async def take(self, line: bytes, *, on: str) -> bytes:
        """Carry out one message; returns lines: asks abandoned since the last call, then its result."""
        message: Any = to_host(line)
        if on != self._id:
            return self._not_me(message.key, on)
        return await self._carry_out(message)

    async def stream(self, line: bytes, *, on: str) -> AsyncGenerator[bytes, None]:
        """As `take`, with the pieces of the answer as they come."""
        message: Any = to_host(line)
        if on != self._id:
            yield self._not_me(message.key, on)
            return
        lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        task = asyncio.create_task(
            self._carry_out(message, lambda piece: lines.put_nowait(to_line(Text(key=message.key, piece=piece))))
        )
        task.add_done_callback(lambda _: lines.put_nowait(None))
        try:
            while (piece := await lines.get()) is not None:
                yield piece
            yield task.result()
        finally:
            task.cancel()

    def check_health(self) -> None:
        """Serve's health check; raises EngineDeadError once the engine is gone."""
        if self._engine.dead:
            raise EngineDeadError(f"engine {self._engine.name!r} is gone", expected="a living engine")

    async def __del__(self) -> None:
        """Called by Serve when a replica is to end in good order."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.close()

    async def _carry_out(self, message: Generate | Load | Unload, on_text: Any = None) -> bytes:
        engine, key = self._engine, message.key
        result: Answered | Swapped | Failed
        try:
            if isinstance(message, Generate):
                request = EngineRequest(message.ask, message.adapter, message.intuition, partial(self._owe, key))
                reply = await engine.generate(request, on_text)
                result = Answered(key=key, reply=reply, counters=engine.counters())
            else:
                move = engine.add_adapter if isinstance(message, Load) else engine.remove_adapter
                cost: SwapCost = await move(message.adapter)
                result = Swapped(key=key, cost=cost, counters=engine.counters())
        except MetierError as error:
            result = Failed.from_error(key, error, self._owed.pop(key, None), engine.counters())
        owed, self._owed = self._owed, {}
        said = [Abandoned(key=key, usage=usage, counters=engine.counters()) for key, usage in owed.items()]
        return b"".join(to_line(line) for line in (*said, result))

    def _owe(self, key: int, ask: Ask, usage: Usage) -> None:
        """Record an ask that ended without a reply; the driver gets it with the next reply."""
        self._owed[key] = usage

    def _not_me(self, key: int, on: str) -> bytes:
        error = EngineDeadError(f"replica {on} is gone", expected="a living replica", remedy="It is asked elsewhere.")
        return to_line(Failed.from_error(key, error))


def _pin(first: int, count: int) -> None:
    """Bind this thread, and the processes started from it, to `count` of the cores it may use."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(first + n) % len(cores)] for n in range(count)})
