"""Calls to a server over HTTP, with bounded retries, and errors that name the server."""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio

from ...agents.errors import AskRejectedError, ContextError, EngineDeadError, EngineError, NotServedError, ServerError
from ..settings.fleet import RemoteSettings

if TYPE_CHECKING:
    import httpx

__all__ = ["GarbledAnswerError", "ServerBusyError", "ServerCalls", "ServerGoneError", "shown"]

RETRIED = frozenset({429, 502, 503, 504})
SHOWN_CHARACTERS = 300
VLLM_ON_CONTEXT = "maximum context length"
"""What vLLM's own server says of a prompt that is too long; it has no code for it."""


class ServerGoneError(EngineDeadError):
    """The server cannot be reached, or has no room; an error inside it is another EngineDeadError."""


class ServerBusyError(ServerGoneError):
    """The server is well, and has no room for another ask now (429)."""


class GarbledAnswerError(EngineError):
    """The server answered with success what is no answer."""


class ServerCalls:
    """The connections to one server at `url`."""

    def __init__(self, url: str, settings: RemoteSettings, api_key: str | None) -> None:
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise ServerError(
                "asking another server needs httpx, which is not installed",
                remedy="Install metier[cpu], or httpx alone.",
            ) from error
        self.url = url.rstrip("/").removesuffix("/v1")
        self._settings = settings
        headers = {"accept-encoding": "identity"}  # what is not packed cannot unpack to a thousand times its size
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key}"
        self.client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(settings.silence_timeout_s, connect=settings.connect_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=settings.connections, max_keepalive_connections=settings.connections),
        )
        self._room = anyio.Semaphore(settings.connections)
        # Of its own: all connections of the other may be taken by asks.
        self.probing = httpx.AsyncClient(base_url=self.url, headers=headers, limits=httpx.Limits(max_connections=1))
        self._errors: tuple[type[Exception], ...] = (httpx.RequestError, httpx.InvalidURL)

    async def close(self) -> None:
        """Close the connections; closing twice is harmless."""
        with anyio.CancelScope(shield=True):
            await self.client.aclose()
            await self.probing.aclose()

    async def probe(self, path: str, timeout_s: float) -> int:
        """The status that a GET of `path` gets at once, without another try; raises ServerGoneError when none comes."""
        unanswered: tuple[type[Exception], ...] = (*self._errors, TimeoutError)
        try:
            with anyio.fail_after(timeout_s):
                async with self.probing.stream("GET", path, timeout=timeout_s) as response:
                    return response.status_code
        except unanswered as error:
            raise self.gone(f"does not answer {path} within {timeout_s:g} s: {_reason(error)}") from error

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the server answers, as JSON.

        Raises: NotServedError, AskRejectedError, GarbledAnswerError, EngineError, EngineDeadError.
        """
        async with self.answered(method, path, body) as response:
            content = await self._whole(response, path)
            if "json" not in response.headers.get("content-type", ""):
                return {}
            data = self.read_json(content, path)
            return data if isinstance(data, dict) else {"data": data}

    def read_json(self, content: bytes, path: str) -> Any:
        """JSON that the server wrote; raises GarbledAnswerError, also for texts that hold half a surrogate pair."""
        try:
            data = json.loads(content.decode())
            json.dumps(data, ensure_ascii=False).encode()
            return data
        except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, digits without end, too deep
            raise self.garbled(f"answered {path} with no JSON", content.decode(errors="replace")) from error

    @asynccontextmanager
    async def answered(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[httpx.Response]:
        """A response without an error status, its body not yet read; calls that failed on the way are tried again.

        Raises: ServerGoneError also when the call has not ended within `answer_timeout_s`; waiting for a connection
        is not counted.
        """
        async with self._room:
            with anyio.move_on_after(self._settings.answer_timeout_s) as scope:
                async with self._tried(method, path, body) as response:
                    yield response
            if scope.cancelled_caught:
                bound = f"remote.answer_timeout_s={self._settings.answer_timeout_s:g}"
                raise self.gone(f"did not end its answer within {bound}")

    @asynccontextmanager
    async def _tried(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[httpx.Response]:
        left = self._settings.retries
        wait_s = self._settings.retry_wait_s
        while True:
            try:
                async with self.client.stream(method, path, json=body) as response:
                    if response.status_code < 400:
                        try:
                            yield response
                        except self._errors as error:
                            raise self.gone(f"stopped in the middle of an answer: {_reason(error)}") from error
                        return
                    text = (await self._whole(response, path)).decode(errors="replace")
                    status = response.status_code
                    asked_s = response.headers.get("retry-after", "")
            except self._errors as error:
                if not left:
                    raise self.gone(f"cannot be reached: {_reason(error)}") from error
                asked_s = ""
            else:
                if status not in RETRIED or not left:
                    raise self.refused(status, path, text)
            left -= 1
            asked = float(asked_s[:9]) if asked_s.isascii() and asked_s.isdigit() else wait_s
            await anyio.sleep(min(asked, self._settings.retry_wait_max_s))
            wait_s *= 2

    async def pieces(self, response: httpx.Response, path: str) -> AsyncIterator[bytes]:
        """The body of a response, unpacked and piece by piece; raises GarbledAnswerError beyond `answer_bytes`."""
        limit, size = self._settings.answer_bytes, 0
        packing = response.headers.get("content-encoding", "identity").strip().lower()
        if packing not in ("identity", "", "gzip"):
            raise self.garbled(f"packed its answer to {path} as", packing)
        unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16) if packing == "gzip" else None
        # As it comes from the wire: `aiter_bytes` would unpack a whole piece at once.
        async for piece in cast("AsyncIterable[bytes]", response.stream):
            if unpack is not None:
                try:
                    piece = unpack.decompress(piece, limit - size + 1)
                except zlib.error as error:
                    raise self.garbled(f"packed its answer to {path} wrongly", str(error)) from error
            size += len(piece)
            if size > limit:
                raise self.garbled(f"answered {path} with more than remote.answer_bytes={limit}", "")
            yield piece
        if unpack is not None and not unpack.eof:
            raise self.garbled(f"packed its answer to {path} wrongly", "it ends early")

    async def lines(self, response: httpx.Response, path: str) -> AsyncIterator[bytes]:
        """The same line by line; what follows the last line end is a line as well."""
        rest = bytearray()
        async for piece in self.pieces(response, path):
            rest += piece
            if b"\n" in piece:
                *whole, last = bytes(rest).split(b"\n")
                rest = bytearray(last)
                for line in whole:
                    yield line.rstrip(b"\r")
        yield bytes(rest)

    async def _whole(self, response: httpx.Response, path: str) -> bytes:
        return b"".join([piece async for piece in self.pieces(response, path)])

    def garbled(self, what: str, said: str) -> GarbledAnswerError:
        """The error that says so."""
        return GarbledAnswerError(
            f"{self.url} {what}{f': {shown(said)}' if said else ''}", expected="an OpenAI-compatible server"
        )

    def gone(self, reason: str) -> ServerGoneError:
        """The error that says so."""
        return ServerGoneError(
            f"{self.url} {reason}", expected="a running server", remedy="Start it, or correct its address."
        )

    def refused(self, status: int, path: str, text: str) -> EngineError:
        """The error that an answer of this status is."""
        code = None
        try:
            said = json.loads(text)
            reason = said["error"]["message"] if "error" in said else said.get("message") or said["detail"]
            code = said["error"].get("code") if "error" in said else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            reason = text
        problem = f"{self.url}{path} answered {status}: {shown(str(reason))}"
        if status in (401, 403):
            return EngineError(problem, expected="a key it knows", remedy="Set METIER_API_KEY to it.")
        if status in RETRIED or status >= 500:
            kind = EngineDeadError
            if status in RETRIED:
                kind = ServerBusyError if status == 429 else ServerGoneError
            return kind(problem, expected="an answer", remedy="Look at the server's own log.")
        if status == 404:
            return NotServedError(problem, expected="a model that is served there")
        if code == "context_length_exceeded" or VLLM_ON_CONTEXT in str(reason):
            return ContextError(problem, expected="a prompt within the context of the model there")
        return AskRejectedError(problem, expected="what that server can serve")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def shown(text: str) -> str:
    """The beginning of a text, as errors show it."""
    text = text.encode(errors="backslashreplace").decode()  # half of a surrogate pair cannot be printed
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
