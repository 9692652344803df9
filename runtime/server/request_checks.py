"""Middleware that refuses a request before it is read: wrong host, origin or key, a large, slow or not strict body."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..settings.server import ServerSettings
from .error_replies import RequestRefused, error_response
from .strict_json import NotStrictError, check_body

__all__ = ["RequestChecks", "is_loopback"]

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Served without a key: the page holds no data, and health checks have no key."""


CHARSET = re.compile(r"charset\s*=\s*\"?([^\s\";]+)", re.IGNORECASE)
UTF_8 = ("utf-8", "utf8", "us-ascii", "ascii")


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RequestChecks:
    """ASGI middleware. With a `key`, clients must send it as a bearer token; without one, the Host must be loopback.

    A web page elsewhere can make its reader's browser send requests here, even with a host name that resolves to this
    machine. So a request with another Origin is refused, and without a key one with another host name.
    `count(path, status)` is called for every answer.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, key: str | None, count: Callable[[str, int], None]
    ) -> None:
        self._app = app
        self._settings = settings
        self._key = None if key is None else key.encode()
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = False

        async def counted(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                self._count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_origin(headers)
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers)
            body = b"" if scope["method"] in ("GET", "HEAD") else await self._read(headers, receive)
            if body is None:
                return
            self._check_body(headers, body)
            await self._app(scope, _replay(body, receive), counted)
        except Exception as error:
            if began:
                raise
            await error_response(error)(scope, receive, counted)

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestRefused(
                f"a page of {origin} asks", status=403, code="other_origin", expected="no page but ours"
            )
        if self._key is None and not is_loopback(_name(host)):
            raise RequestRefused(
                f"host {host!r}",
                status=403,
                code="other_host",
                expected="localhost, or a server with a key",
                remedy="Set METIER_API_KEY where the server is started.",
            )

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise RequestRefused(
                "wrong API key" if given else "no API key",
                status=401,
                code="invalid_api_key",
                expected="Authorization: Bearer, with the METIER_API_KEY that the server was started with",
            )

    def _check_body(self, headers: Headers, body: bytes) -> None:
        if not body:
            return
        encoding = headers.get("content-encoding", "identity")
        charset = CHARSET.search(headers.get("content-type", ""))
        if encoding.lower() != "identity":
            raise _not_utf_8(f"content-encoding {encoding[:40]!r}")
        if charset is not None and charset[1].lower() not in UTF_8:
            raise _not_utf_8(f"charset {charset[1][:40]!r}")
        try:
            text = body.decode("utf-8-sig")
            if "\0" in text:
                raise NotStrictError("it holds a byte of 0")
            check_body(text, self._settings.json_depth)
        except ValueError as error:  # also UnicodeDecodeError
            raise RequestRefused(
                f"the body cannot be read: {error}",
                code="invalid_json",
                expected="JSON in UTF-8 with finite numbers, each field once, of at most "
                f"server.json_depth={self._settings.json_depth} levels",
            ) from error

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client went away before its end."""
        limit = self._settings.request_kib << 10
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise self._too_large(announced)
        pieces, size, more = [], 0, True
        with anyio.move_on_after(self._settings.body_timeout_s) as scope:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > limit:
                    raise self._too_large(f"more than {limit}")
                more = message.get("more_body", False)
        if scope.cancelled_caught:
            raise RequestRefused(
                f"the body did not arrive within body_timeout_s={self._settings.body_timeout_s}",
                status=408,
                code="body_timeout",
            )
        return b"".join(pieces)

    def _too_large(self, size: str) -> RequestRefused:
        return RequestRefused(
            f"a body of {size} bytes",
            status=413,
            code="request_too_large",
            expected=f"at most request_kib={self._settings.request_kib}",
            remedy="Shorten the messages, or raise server.request_kib.",
        )


def _not_utf_8(what: str) -> RequestRefused:
    return RequestRefused(f"a body of {what}", code="unsupported_encoding", expected="JSON in UTF-8, not compressed")


def _name(host: str) -> str:
    """The host of a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the whole body first, then what comes after it: the disconnect."""
    read = False

    async def replayed() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
