"""One replica as an `Engine`: the messages of a supervised engine, carried by Serve's handle instead of a socket."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import anyio

from ...agents.backend import OnText
from ...agents.errors import EngineDeadError, EngineError
from ...agents.messages import Reply
from ..engines.engine import EngineCounters, EngineRequest
from ..engines.supervised.host_protocol import (
    Abandoned,
    Answered,
    Failed,
    FromHost,
    Generate,
    Load,
    Ready,
    Swapped,
    Text,
    Unload,
    from_host,
    to_line,
)
from ..slots.adapter import LoadedAdapter, SwapCost

__all__ = ["ReplicaEngine"]


class ReplicaEngine:
    """An `Engine` in a replica. Make it with `meet`; Serve starts and ends the replica, `close` only lets go of it.

    When the replica dies, or is given up with `lose`, the asks under way there get EngineDeadError.
    """

    def __init__(self, handle: Any, replica: str, ready: Ready) -> None:
        self.name = ready.counters.name
        self.replica = replica
        self.pids = ready.pids
        self._handle = handle
        self._keys = itertools.count(1)
        self._counters = ready.counters
        self._gone: dict[int, EngineRequest] = {}
        self._written_off: dict[str, float] = {}
        self._under_way: set[anyio.CancelScope] = set()

    @classmethod
    async def meet(cls, handle: Any, replica: str, timeout_s: float) -> Self:
        """Ask a replica what it is; raises EngineDeadError when it does not answer within `timeout_s`."""
        try:
            with anyio.fail_after(timeout_s):
                message = from_host(await _answer(handle.hello.remote(on=replica)))
        except TimeoutError as error:
            raise EngineDeadError(f"replica {replica} does not answer", expected="a living replica") from error
        if isinstance(message, Failed):
            raise message.to_error()
        assert isinstance(message, Ready)
        return cls(handle, replica, message)

    @staticmethod
    async def anyone(handle: Any) -> None:
        """Make a first call to any replica: before it the handle does not ask Serve for its replicas."""
        await _answer(handle.hello.remote(on=""))

    async def generate(self, request: EngineRequest, on_text: OnText | None = None) -> Reply:
        """See `Engine.generate`."""
        key = next(self._keys)
        streamed = on_text is not None
        message = Generate(
            key=key, ask=request.ask, adapter=request.adapter, intuition=request.intuition, stream=streamed
        )
        try:
            if on_text is None:
                result = await self._send(message, request)
            else:
                result = await self._stream(message, request, on_text)
        except anyio.get_cancelled_exc_class():
            self._gone[key] = request  # the replica says with the next reply what it has used
            raise
        assert isinstance(result, Answered)
        return result.reply

    async def add_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.add_adapter`."""
        result = await self._send(Load(key=next(self._keys), adapter=adapter))
        assert isinstance(result, Swapped)
        return result.cost

    async def remove_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.remove_adapter`."""
        result = await self._send(Unload(key=next(self._keys), adapter=adapter))
        assert isinstance(result, Swapped)
        return result.cost

    def write_off(self, role: str, cpu_s: float) -> None:
        """See `Engine.write_off`."""
        self._written_off[role] = self._written_off.get(role, 0.0) + cpu_s

    def counters(self) -> EngineCounters:
        """See `Engine.counters`; as of the last reply."""
        abandoned = dict(self._counters.abandoned_cpu_s)
        for role, cpu_s in self._written_off.items():
            abandoned[role] = abandoned.get(role, 0.0) + cpu_s
        return replace(self._counters, abandoned_cpu_s=abandoned)

    async def close(self) -> None:
        """Does nothing: Serve ends the replica."""

    def lose(self) -> None:
        """End what is under way there: Serve has given the replica up, and one that hangs ends nothing by itself."""
        for scope in self._under_way:
            scope.cancel()

    @contextmanager
    def _until_lost(self) -> Iterator[None]:
        with anyio.CancelScope() as scope:
            self._under_way.add(scope)
            try:
                yield
            finally:
                self._under_way.discard(scope)
        if scope.cancelled_caught:
            raise EngineDeadError(f"replica {self.replica} was given up", expected="a replica that is well")

    async def _send(self, message: Generate | Load | Unload, request: EngineRequest | None = None) -> FromHost:
        with self._until_lost():
            return self._take(await _answer(self._handle.take.remote(to_line(message), on=self.replica)), request)
        raise AssertionError("lost replicas raise")

    async def _stream(self, message: Generate, request: EngineRequest, on_text: OnText) -> FromHost:
        pieces = self._handle.options(stream=True).stream.remote(to_line(message), on=self.replica)
        try:
            with self._until_lost():
                async for line in _pieces(pieces):
                    said = from_host(line) if line.count(b"\n") == 1 else None
                    if not isinstance(said, Text):
                        return self._take(line, request)
                    on_text(said.piece)
        except BaseException:
            pieces.cancel()
            raise
        raise EngineDeadError(f"engine {self.name!r} stopped in an answer", expected="a whole reply")

    def _take(self, lines: bytes, request: EngineRequest | None) -> FromHost:
        """Record what the lines of a replica report; returns the last. Raises the error that it carries."""
        *owed, last = map(from_host, lines.splitlines())
        for message in owed:
            assert isinstance(message, Abandoned)
            gone = self._gone.pop(message.key, None)
            if gone is not None and gone.on_abandoned is not None:
                gone.on_abandoned(gone.ask, message.usage)
        assert isinstance(last, Answered | Swapped | Failed)
        self._counters = last.counters or self._counters
        if isinstance(last, Failed):
            if request is not None and request.on_abandoned is not None and last.usage is not None:
                request.on_abandoned(request.ask, last.usage)
            raise last.to_error()
        return last


async def _answer(response: Any) -> bytes:
    """The result of a call, which is cancelled together with the task that waits for it.

    Raises: EngineDeadError when the replica is gone, EngineError when it could not carry out the call.
    """
    try:
        answer: bytes = await response
    except anyio.get_cancelled_exc_class():
        response.cancel()
        raise
    except Exception as error:
        raise _as_ours(error) from error
    return answer


async def _pieces(pieces: Any) -> Any:
    try:
        async for line in pieces:
            yield line
    except anyio.get_cancelled_exc_class():
        raise
    except Exception as error:
        raise _as_ours(error) from error


def _as_ours(error: Exception) -> EngineError:
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    if isinstance(error, RayTaskError):  # raised by the replica's code: it lives
        return EngineError(f"a replica failed: {error.cause!r}", expected="a call that it can carry out")
    if isinstance(error, RayError | RayServeException):
        return EngineDeadError(f"a replica is gone: {error}".splitlines()[0], expected="a living replica")
    return EngineError(f"Ray failed: {error!r}", expected="a running Ray", remedy="Look at the logs of Ray.")
