"""Which servers a fleet has, what they may hold, and how long they are waited for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ...agents.errors import SettingsError
from ...router.placement.placement import PlacementCosts

__all__ = ["FleetServer", "FleetSettings", "RemoteSettings"]


class FleetServer(BaseModel):
    """One server: its address, with or without `/v1`, and what may go there.

    `adapters` names the variants whose adapters it may hold; None is all. It has room for `adapter_slots` of them
    (vLLM's `--max-loras`), None for as many as the fleet says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(pattern=r"^https?://[^/\s,]+(/v1)?/?$")
    adapters: frozenset[str] | None = None
    adapter_slots: int | None = Field(default=None, ge=1)

    @field_validator("url")
    @classmethod
    def _without_version(cls, url: str) -> str:
        return url.rstrip("/").removesuffix("/v1").lower()


class FleetSettings(BaseModel):
    """Bounds of a `Fleet`; unknown fields and values out of range are refused. `remote.*` bounds each call.

    `model` is the name of the base that every server has to serve; empty is what the first one says. An ask is tried at
    `tries` servers at most; where none is left it waits, as `remote.retries` and `remote.retry_wait_s` say.

    Every `health_every_s` each server has `health_timeout_s` to say that it is well. After `failures_to_open` failures
    in a row nothing is sent there for `open_s`, and what was under way goes elsewhere; then its health is asked
    again. A load that takes longer than `load_timeout_s` has failed. `conversations_kept` is how many
    prompts are remembered for each server as being in its prefix cache; `costs` is what placement reckons with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    servers: tuple[FleetServer, ...] = ()
    model: str = ""
    adapter_slots: int = Field(default=4, ge=1)
    tries: int = Field(default=4, ge=1, le=100)
    health_every_s: float = Field(default=5.0, gt=0)
    health_timeout_s: float = Field(default=2.0, gt=0)
    failures_to_open: int = Field(default=3, ge=1)
    open_s: float = Field(default=10.0, ge=0)
    load_timeout_s: float = Field(default=60.0, gt=0)
    conversations_kept: int = Field(default=1024, ge=1)
    costs: PlacementCosts = PlacementCosts()

    def of(self, urls: Iterable[str]) -> FleetSettings:
        """These settings for servers given by their addresses; one that `servers` names keeps what is said of it.

        Raises: SettingsError for an address that is none, or that is given twice.
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
