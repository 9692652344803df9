"""Whether the processes that compute for a host are alive, seen from inside the host."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ...meters.cpu_clock import ProcessesClock
from ...settings.engine import EngineSettings

__all__ = ["CorePulse"]

_BUSY_SHARE = 0.01
"""CPU seconds per second from which a process counts as busy: a stopped one uses none, a step at least one core's
share of a crowded machine."""


class CorePulse:
    """Calls `beat` about every `beat_every_s` for as long as the engine core shows that it is alive.

    It is alive when it answers a question, which it does between two steps, or while the processes `pids` use CPU
    time. So a step may take long, but not longer than `step_timeout_s`: a core that spins for ever uses CPU time too.
    `ask` puts the question. The limit is counted in waits, so a pause of the whole machine counts as one of them.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Any]],
        pids: tuple[int, ...],
        settings: EngineSettings,
        beat: Callable[[], None],
    ) -> None:
        self._ask = ask
        self._clock = ProcessesClock(pids)
        self._every_s = settings.beat_every_s
        self._patience = settings.step_timeout_s / self._every_s
        self._beat = beat

    async def run(self) -> None:
        """Watch for ever; whatever the question raises ends it."""
        self._clock.lap()
        while True:
            answer = asyncio.ensure_future(self._ask())
            try:
                await self._wait_for(answer)
            finally:
                answer.cancel()
            await answer
            self._beat()
            await asyncio.sleep(self._every_s)
            self._clock.lap()

    async def _wait_for(self, answer: asyncio.Future[Any]) -> None:
        waits = 0
        while not (await asyncio.wait((answer,), timeout=self._every_s))[0]:
            waits += 1
            busy = self._clock.lap() >= _BUSY_SHARE * self._every_s
            if busy and waits < self._patience:
                self._beat()
