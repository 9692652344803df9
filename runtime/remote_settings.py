"""How long, and how often, an ask is tried at a server of others."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["RemoteSettings"]


class RemoteSettings(BaseModel):
    """Bounds of a `RemoteBackend`; unknown fields and values out of range are refused.

    A connection is made within `connect_timeout_s`, and the server may be silent for `silence_timeout_s` before it is
    given up. What failed on the way (no connection, 429, 502, 503, 504) is tried `retries` times more, after
    `retry_wait_s`, twice that, and so on, or what the server's Retry-After says, at most `retry_wait_max_s`.
    `connections` are open at a time; further asks wait in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    connect_timeout_s: float = Field(default=10.0, gt=0)
    silence_timeout_s: float = Field(default=600.0, gt=0)
    retries: int = Field(default=3, ge=0, le=20)
    retry_wait_s: float = Field(default=0.5, ge=0)
    retry_wait_max_s: float = Field(default=30.0, ge=0)
    connections: int = Field(default=64, ge=1)
