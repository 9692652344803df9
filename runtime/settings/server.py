"""What the server allows its clients: sizes, times, and how many may be inside or wait."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ServerSettings"]


class ServerSettings(BaseModel):
    """Bounds of `metier serve`; unknown fields and values out of range are refused.

    At most `requests_inside` requests are answered at once and `requests_waiting` wait for that, in order; the next
    one is told to come back (429) after at most `retry_after_max_s`. Runs count as one request each.

    A body has at most `request_kib` and arrives within `body_timeout_s`. A request is given up after
    `request_timeout_s`, waiting included; a client that does not take what is written to it, after `write_timeout_s`.
    A stream that has nothing to say sends a comment every `keep_alive_s`, so that proxies keep it open.

    At most `watchers` clients watch runs; one that falls `watch_backlog` events behind is let go, and may come back
    to the last `events_kept`. On SIGTERM what is under way has `drain_s` to end.

    `max_answer_tokens` bounds what a request may ask for, `answer_tokens` is what it gets when it does not say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_inside: int = Field(default=64, ge=1, le=100_000)
    requests_waiting: int = Field(default=256, ge=0, le=100_000)
    retry_after_max_s: int = Field(default=60, ge=1)
    request_kib: int = Field(default=1024, ge=1)
    body_timeout_s: float = Field(default=30.0, gt=0)
    request_timeout_s: float = Field(default=600.0, gt=0)
    write_timeout_s: float = Field(default=30.0, gt=0)
    keep_alive_s: float = Field(default=15.0, gt=0)
    watchers: int = Field(default=64, ge=0)
    watch_backlog: int = Field(default=1000, ge=1)
    events_kept: int = Field(default=2000, ge=1)
    drain_s: float = Field(default=30.0, ge=0)
    max_answer_tokens: int = Field(default=8192, ge=1)
    answer_tokens: int = Field(default=256, ge=1)
