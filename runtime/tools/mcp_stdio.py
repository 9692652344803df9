"""An MCP server as a child process: JSON-RPC over its pipes, each message bounded, its last words kept for errors.

The `mcp` package has such a transport too; its buffer for one line has no limit.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

__all__ = ["ServerProcess", "open_stdio"]

LAST_WORDS = 300
"""Bytes of what a server wrote to its standard error that an error about it quotes."""

SHOWN_BYTES = 100
"""Of a line that is no message, how many bytes an error shows."""

STOP_TIMEOUT_S = 2.0
"""Seconds that a server has to end once its input is closed, before it is killed."""


class ServerProcess:
    """What is known of a server's process from outside."""

    def __init__(self) -> None:
        self.ended = False
        """Whether it has closed its output, or was given up."""
        self.problem = ""
        """What it did wrong, where that is known."""
        self._words: deque[bytes] = deque()
        self._kept = 0

    @property
    def last_words(self) -> str:
        """The end of what it wrote to its standard error."""
        return b"".join(self._words)[-LAST_WORDS:].decode("utf-8", "replace").strip()

    async def listen(self, stderr: ByteReceiveStream) -> None:
        """Read its standard error, so that it never waits for us, and keep the end of it."""
        with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
            async for piece in stderr:
                self._words.append(piece)
                self._kept += len(piece)
                while self._kept - len(self._words[0]) >= LAST_WORDS:
                    self._kept -= len(self._words.popleft())


@asynccontextmanager
async def open_stdio(
    command: Sequence[str], pass_env: Sequence[str], known: ServerProcess, max_message_bytes: int
) -> AsyncGenerator[tuple[Any, Any]]:
    """Start a server and yield the streams that `mcp.Client` talks through; at the end it is stopped, then killed.

    Of our environment it gets what any program needs (PATH, HOME, …) and the variables named in `pass_env`. Lines of
    its output that are no messages are skipped.
    Raises: OSError when the command cannot be started.
    """
    from mcp.client.stdio import get_default_environment
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    environment = get_default_environment() | {name: os.environ[name] for name in pass_env if name in os.environ}
    process = await anyio.open_process(command, env=environment, start_new_session=True)
    assert process.stdin and process.stdout and process.stderr
    stdin, stdout = process.stdin, BufferedByteReceiveStream(process.stdout)
    to_session, from_server = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    to_server, from_session = anyio.create_memory_object_stream[SessionMessage](0)

    async def read() -> None:
        async with to_session:
            try:
                while True:
                    line = await stdout.receive_until(b"\n", max_message_bytes)
                    try:
                        message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                    except ValueError:
                        known.problem = f"it wrote a line to its output that is no message: {line[:SHOWN_BYTES]!r}"
                        continue
                    await to_session.send(SessionMessage(message))
            except anyio.DelimiterNotFound:
                known.problem = f"it sent a message of more than {max_message_bytes >> 20} MiB"
            except (anyio.IncompleteRead, anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
                pass  # it has ended, or we have
            finally:
                known.ended = True

    async def write() -> None:
        async with from_session:
            with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
                async for message in from_session:
                    text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    await stdin.send(text.encode() + b"\n")

    async with anyio.create_task_group() as pipes:
        pipes.start_soon(read)
        pipes.start_soon(write)
        pipes.start_soon(known.listen, process.stderr)
        try:
            yield from_server, to_server
        finally:
            with anyio.CancelScope(shield=True):
                from_server.close()
                to_server.close()
                await _stop(process)
            pipes.cancel_scope.cancel()


async def _stop(process: Process) -> None:
    with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        await process.stdin.aclose()  # type: ignore[union-attr]
    with anyio.move_on_after(STOP_TIMEOUT_S):
        await process.wait()
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with anyio.move_on_after(STOP_TIMEOUT_S):
            await process.wait()
    await process.aclose()
