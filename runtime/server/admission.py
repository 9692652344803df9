"""Admission of requests: how many are answered at once, how many wait, and refusals of the others."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio

from ..settings.server import ServerSettings
from .error_replies import RequestRefused

__all__ = ["Admission"]

SMOOTHING = 0.1
"""Weight of the newest request in the mean time that Retry-After is computed from."""


class Admission:
    """Lets requests in, in the order they came; those beyond the queue are refused with 429, all after `close`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._room = anyio.Semaphore(settings.requests_inside)
        self.inside = 0
        self.waiting = 0
        self.refused = 0
        self.closed = False
        self._mean_s = 1.0

    @asynccontextmanager
    async def enter(self) -> AsyncGenerator[None]:
        """Be inside for as long as the block lasts.

        Raises: RequestRefused, with 429 and Retry-After when the queue is full, with 503 when the server goes.
        """
        self.check()
        self.waiting += 1
        try:
            await self._room.acquire()
        finally:
            self.waiting -= 1
        self.inside += 1
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.inside -= 1
            self._room.release()
            self._mean_s += SMOOTHING * (time.monotonic() - began_s - self._mean_s)

    def check(self) -> None:
        """Raise what `enter` would raise at once, without entering."""
        if self.closed:
            raise RequestRefused(
                "the server is about to stop",
                status=503,
                code="server_stopping",
                retry_after_s=self._settings.retry_after_max_s,
            )
        if self._room.value == 0 and self.waiting >= self._settings.requests_waiting:
            self.refused += 1
            raise RequestRefused(
                f"{self.inside} requests are inside and {self.waiting} wait",
                status=429,
                code="queue_full",
                retry_after_s=self.retry_after_s(),
                remedy="Come back after Retry-After seconds, or raise server.requests_waiting.",
            )

    def retry_after_s(self) -> int:
        """Whole seconds after which there should be room, from how long requests took lately."""
        turns = (self.waiting + 1) / self._settings.requests_inside
        return min(max(math.ceil(turns * self._mean_s), 1), self._settings.retry_after_max_s)

    def close(self) -> None:
        """Refuse all further requests."""
        self.closed = True
