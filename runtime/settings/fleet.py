"""The servers of a fleet, their adapters, and the bounds of calls to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ...agents.errors import SettingsError
from ...agents.frozen_model import FrozenModel
from ...router.placement.placement import PlacementCosts

__all__ = ["FleetServer", "FleetSettings", "RemoteSettings"]


class FleetServer(FrozenModel):
    """One server of a fleet."""

    url: str = Field(pattern=r"^https?://[^/\s,]+(/v1)?/?$")
    """Its address, with or without `/v1`."""

    adapters: frozenset[str] | None = None
    """Names of the variants whose adapters it may hold. None is all."""

    adapter_slots: int | None = Field(default=None, ge=1)
    """Adapters it has room for, vLLM's `--max-loras`. None is what the fleet says."""

    @field_validator("url")
    @classmethod
    def _without_version(cls, url: str) -> str:
        return url.rstrip("/").removesuffix("/v1").lower()


class FleetSettings(FrozenModel):
    """Which servers a fleet has, and its bounds. `remote.*` bounds each call.

    >>> [server.url for server in FleetSettings(adapter_slots=2).of(["http://a:8000/v1", "http://b:8000"]).servers]
    ['http://a:8000', 'http://b:8000']
    """

    servers: tuple[FleetServer, ...] = ()
    """The servers. `--engine URL,URL` names them instead."""

    model: str = ""
    """Name of the base that every server has to serve. Empty is what the first one says."""

    adapter_slots: int = Field(default=4, ge=1)
    """Adapters that a server has room for where `servers` does not say."""

    tries: int = Field(default=4, ge=1, le=100)
    """Servers that one ask is tried at. When none is left it waits, as `remote.retries` and
    `remote.retry_wait_s` say."""

    health_every_s: float = Field(default=5.0, gt=0)
    """Seconds between two health checks of a server."""

    health_timeout_s: float = Field(default=2.0, gt=0)
    """Seconds that a server has to answer a health check."""

    failures_to_open: int = Field(default=3, ge=1)
    """After this many failures in a row a server gets no asks, and those it has go elsewhere."""

    open_s: float = Field(default=10.0, ge=0)
    """Seconds without asks before such a server's health is checked again and it has to answer one token."""

    load_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that loading an adapter may take before it counts as failed, and that a server which comes back has for
    its first token."""

    conversations_kept: int = Field(default=1024, ge=1)
    """Prompts that are remembered for each server as being in its prefix cache."""

    costs: PlacementCosts = PlacementCosts()
    """Costs that decide where an ask is placed."""

    def of(self, urls: Iterable[str]) -> FleetSettings:
        """These settings for servers given by their addresses; a server that `servers` has keeps its entry.

        Raises: SettingsError for text that is not an address, or an address given twice.
        """
        named = {server.url: server for server in self.servers}
        try:
            given = [FleetServer(url=url.strip()) for url in urls]
            servers = [named.get(server.url, server).model_dump() for server in given]
            return FleetSettings.model_validate(self.model_dump() | {"servers": servers})
        except ValidationError as error:
            first = error.errors()[0]
            raise SettingsError(
                f"servers {', '.join(urls)}: {first['msg']}", expected="http://HOST:PORT,http://HOST:PORT"
            ) from error

    @model_validator(mode="after")
    def _check_servers(self) -> Self:
        urls = [server.url for server in self.servers]
        twice = sorted({url for url in urls if urls.count(url) > 1})
        if twice:
            raise ValueError(f"server {twice[0]} is named twice; name each once, with all its adapters")
        return self


class RemoteSettings(FrozenModel):
    """Bounds of the calls to a server."""

    connect_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds to make a connection."""

    silence_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that a server may send nothing before the call is given up."""

    answer_timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds that a call may take with all its retries, so that a server which sends a byte now and then is given up
    too. The default is an answer of 2,048 tokens at a token in two seconds, with time to wait for its turn there."""

    answer_bytes: int = Field(default=64 << 20, ge=1 << 16)
    """Largest answer of a server, in bytes after unpacking. A stream counts as one answer."""

    retries: int = Field(default=3, ge=0, le=20)
    """How often a call that failed on the way (no connection, 429, 502, 503, 504) is made again."""

    retry_wait_s: float = Field(default=0.5, ge=0)
    """Seconds before the first retry; each further wait is twice as long. A server's Retry-After is followed
    instead."""

    retry_wait_max_s: float = Field(default=30.0, ge=0)
    """Longest wait before a retry, in seconds, whatever the server says."""

    connections: int = Field(default=64, ge=1)
    """Connections open at a time. Further asks wait, in order."""
