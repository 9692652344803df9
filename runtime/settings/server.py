"""Bounds of `metier serve`: sizes, times, and numbers of requests."""

from __future__ import annotations

from pydantic import Field

from ...agents.frozen_model import FrozenModel

__all__ = ["ServerSettings", "ThinkingEfforts"]


class ThinkingEfforts(FrozenModel):
    """Most tokens of thinking that each word of `reasoning_effort` stands for; `none` is thinking off.

    >>> ThinkingEfforts(high=1024).tokens("high")
    1024
    """

    minimal: int = Field(default=32, ge=0)
    """Tokens for `minimal`."""

    low: int = Field(default=128, ge=0)
    """Tokens for `low`."""

    medium: int = Field(default=256, ge=0)
    """Tokens for `medium`, and for clients that only say that a model may think."""

    high: int = Field(default=512, ge=0)
    """Tokens for `high`."""

    xhigh: int = Field(default=768, ge=0)
    """Tokens for `xhigh`."""

    max: int = Field(default=1024, ge=0)
    """Tokens for `max`."""

    def tokens(self, effort: str) -> int:
        """Tokens for a word."""
        return 0 if effort == "none" else int(getattr(self, effort))


class ServerSettings(FrozenModel):
    """Bounds of `metier serve`.

    >>> ServerSettings(requests_inside=8).requests_waiting
    256
    """

    requests_inside: int = Field(default=64, ge=1, le=100_000)
    """Requests that are answered at the same time. A run counts as one."""

    requests_waiting: int = Field(default=256, ge=0, le=100_000)
    """Requests that may wait for that, in order. Further ones are refused with 429."""

    retry_after_max_s: int = Field(default=60, ge=1)
    """Longest time that a refused client is told to wait, in seconds."""

    connections: int = Field(default=640, ge=1, le=1_000_000)
    """Connections open at a time; further ones are refused with 503. Each needs a file descriptor (`ulimit -n`)."""

    connections_per_client: int = Field(default=512, ge=1, le=1_000_000)
    """Connections open at a time from one address. A proxy is one address."""

    idle_timeout_s: int = Field(default=5, ge=1)
    """Seconds that a connection may stay open between two requests."""

    header_bytes: int = Field(default=1 << 16, ge=1024)
    """Largest address and headers of a request together, in bytes."""

    header_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds in which a new connection has to begin a request, and in which a request's headers have to arrive."""

    request_kib: int = Field(default=1024, ge=1)
    """Largest body of a request, in KiB."""

    body_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds in which a body has to arrive."""

    json_depth: int = Field(default=64, ge=8, le=200)
    """Most levels of lists and objects in each other in a body."""

    request_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds until a request is given up, waiting included."""

    write_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that a client may take to read what is written to it before it is given up."""

    keep_alive_s: float = Field(default=15.0, gt=0)
    """Seconds after which a stream with nothing to say sends a comment, so that proxies keep it open."""

    watchers: int = Field(default=64, ge=0)
    """Clients that may watch runs at a time."""

    watch_backlog: int = Field(default=1000, ge=1)
    """A client that has not read this many events is disconnected."""

    events_kept: int = Field(default=2000, ge=1)
    """Last events that a client who comes back can still read."""

    drain_s: float = Field(default=30.0, ge=0)
    """Seconds that requests under way have to end after SIGTERM."""

    max_answer_tokens: int = Field(default=8192, ge=1)
    """Most answer tokens that a request may ask for."""

    choices: int = Field(default=8, ge=1, le=128)
    """Most answers to one request (`n`). Each is a request inside."""

    efforts: ThinkingEfforts = ThinkingEfforts()
    """Tokens of thinking for the words of `reasoning_effort`."""

    tools: int = Field(default=64, ge=0)
    """Most tools that a request may bring."""

    calls: int = Field(default=8, ge=1)
    """Most calls of a request's tools in one reply."""

    responses_kept: int = Field(default=10_000, ge=0)
    """Newest responses that are kept in the run store, for `previous_response_id`. 0 keeps none."""

    responses_kept_days: float = Field(default=30.0, gt=0)
    """Days that a response is kept."""

    answer_tokens: int = Field(default=256, ge=1)
    """Answer tokens of a request that does not say."""
