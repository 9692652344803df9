"""HTTP connections that cannot be held for ever or filled without end, before the application hears of them."""

from __future__ import annotations

import json
import logging
from asyncio import AbstractEventLoop, BaseTransport, Transport
from collections import Counter, deque
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from ..settings.server import ServerSettings
from .error_replies import RequestRefused, error_body

__all__ = ["BoundedConnection", "OpenConnections"]

log = logging.getLogger("uvicorn.error.connections")
log.setLevel(logging.ERROR)  # uvicorn has a warning for everything that a stranger sends

LINGER_S, LINGER_BYTES = 1.0, 1 << 20
"""What a refused client may still send while it reads why: closing at once would reset the connection before that."""


class OpenConnections:
    """How many connections are open, and how many of them from each address."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._open: Counter[str] = Counter()

    def enter(self, address: str) -> None:
        """Count a connection, also one that is refused: it leaves when it is closed.

        Raises: RequestRefused when there are too many already.
        """
        total, own = self._open.total(), self._open[address]
        self._open[address] += 1
        for name, count in (("connections", total), ("connections_per_client", own)):
            limit: int = getattr(self.settings, name)
            if count >= limit:
                raise RequestRefused(
                    f"{count} connections are open{'' if name == 'connections' else f' from {address}'}",
                    status=503,
                    code="too_many_connections",
                    retry_after_s=1,
                    expected=f"at most server.{name}={limit}",
                    remedy="Close some, or come back later.",
                )

    def leave(self, address: str) -> None:
        """Count it no more."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection with the limits that it lacks: `check` closes what is due, and is to be called often.

    A request has `header_timeout_s` from its first byte to the end of its headers, and they have `header_bytes`; a new
    connection has as long to begin. `request_checks` bounds the body, but the rest of a body that nobody reads (the
    answer was given before its end) has `body_timeout_s` to arrive. A client that does not read what is written, or
    does not close when we do, is cut off after `write_timeout_s`. Refusals here have OpenAI's error shape too.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
        *,
        opened: OpenConnections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = log
        self._opened = opened
        self._settings = opened.settings
        self._address = ""
        self._refused: RequestRefused | None = None
        # Bytes that came since the parser last got on, and bytes of headers and trailers of this request.
        self._unparsed = self._header_bytes = self._lingered_bytes = 0
        self._in_headers = self._in_body = False
        self._unanswered: deque[RequestResponseCycle] = deque()  # the first is being answered
        # By our loop's clock: when the client must have sent, have read, or have let go.
        self._arrival_due_s: float | None = None
        self._write_due_s: float | None = None
        self._close_due_s: float | None = None

    # --- from the transport -------------------------------------------------------------------------------

    def connection_made(self, transport: BaseTransport) -> None:
        """See `asyncio.Protocol`; one too many is refused."""
        super().connection_made(cast(Transport, transport))
        self._address = self.client[0] if self.client else ""
        self._arrival_due_s = self.loop.time() + self._settings.header_timeout_s
        try:
            self._opened.enter(self._address)
        except RequestRefused as refusal:
            self._refuse(refusal)
            self.transport.close()  # without lingering: there are too many

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._opened.leave(self._address)
        self._leave_unanswered()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`; what comes after a refusal is dropped."""
        if self.transport.is_closing():
            return
        if self._refused is not None:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > LINGER_BYTES:
                self.transport.close()
            return
        if not self._in_body and self._arrival_due_s is None:
            self._arrival_due_s = self.loop.time() + self._settings.header_timeout_s
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > self._settings.header_bytes and self._refused is None:
            self._refuse(self._too_large())

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`: the client is behind with reading."""
        self._write_due_s = self.loop.time() + self._settings.write_timeout_s
        super().pause_writing()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._write_due_s = None
        super().resume_writing()

    # --- from the parser ----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._header_bytes, self._in_headers = 0, True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after the body; raises RequestRefused when they are too large together."""
        self._header_bytes += len(name) + len(value)
        self._check_headers()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The application is asked from here on."""
        self._header_bytes += len(self.url)
        self._check_headers()
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        self._unparsed, self._in_headers, self._in_body, self._arrival_due_s = 0, False, True, None

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request has come."""
        self._unparsed, self._in_body = 0, False
        super().on_message_complete()
        if self.cycle.response_complete:  # uvicorn waits for another request only where the answer is what comes last
            self._arrival_due_s = self.loop.time() + self._settings.header_timeout_s

    def on_response_complete(self) -> None:
        """The answer is written."""
        self._unanswered.popleft()
        super().on_response_complete()
        if self._in_body:
            self._arrival_due_s = self.loop.time() + self._settings.body_timeout_s

    def send_400_response(self, msg: str) -> None:
        """What the parser cannot read, or one of its calls has refused."""
        if self._refused is None:
            large = self._header_bytes > self._settings.header_bytes
            what = RequestRefused(msg, code="invalid_http", expected="HTTP/1.1")
            self._refuse(self._too_large() if large else what)

    # --- refusing and closing -----------------------------------------------------------------------------

    def check(self, now_s: float) -> None:
        """Close or cut off a connection whose client is late."""
        if self.transport.is_closing():
            if self._close_due_s is None:
                self._close_due_s = now_s + self._settings.write_timeout_s
            elif now_s >= self._close_due_s:
                self.transport.abort()
        elif self._write_due_s is not None and now_s >= self._write_due_s:
            self.transport.abort()
        elif self._arrival_due_s is not None and now_s >= self._arrival_due_s:
            self._late()

    def _late(self) -> None:
        self._arrival_due_s = None
        if self._refused is not None:
            self.transport.close()
        elif self._unanswered:
            pass  # it may send nonsense while it reads its answer; it is closed after that
        elif self._in_headers:
            problem = f"the headers did not arrive within header_timeout_s={self._settings.header_timeout_s:g}"
            self._refuse(RequestRefused(problem, status=408, code="header_timeout"))
        else:
            self.transport.close()

    def _leave_unanswered(self) -> None:
        """Say to the application that nobody reads its answers; uvicorn says so of the last request only."""
        for cycle in self._unanswered:
            cycle.disconnected, cycle.waiting_for_100_continue = True, False
            cycle.message_event.set()

    def _check_headers(self) -> None:
        if self._header_bytes > self._settings.header_bytes:
            raise self._too_large()

    def _too_large(self) -> RequestRefused:
        return RequestRefused(
            "the headers are too large",
            status=431,
            code="headers_too_large",
            expected=f"at most header_bytes={self._settings.header_bytes}, the address included",
        )

    def _refuse(self, refusal: RequestRefused) -> None:
        """Answer without the application, unless it has begun to, and close."""
        self._refused = refusal
        begun = bool(self._unanswered) and self._unanswered[0].response_started
        self._leave_unanswered()
        if begun:
            self.transport.close()
            return
        status, body, more = error_body(refusal)
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
        lines = [f"{name}: {value}\r\n".encode() for name, value in (headers | more).items()]
        self.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", content]))
        self.transport.write_eof()
        self._arrival_due_s = self.loop.time() + LINGER_S
