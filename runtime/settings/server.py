"""Bounds of `metier serve`: sizes, times, and numbers of requests."""

from __future__ import annotations

from pydantic import Field

from ...agents.frozen_model import FrozenModel

__all__ = ["ServerSettings"]


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

    request_kib: int = Field(default=1024, ge=1)
    """Largest body of a request, in KiB."""

    body_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds in which a body has to arrive."""

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

    answer_tokens: int = Field(default=256, ge=1)
    """Answer tokens of a request that does not say."""
