"""Settings of a session: from a file, then the environment, then what the caller passes; unknown names fail."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ...agents.errors import SettingsError, did_you_mean
from ...agents.text_files import UnreadableTextError, parse_yaml, read_yaml_mapping, shown
from ...router.priority import PrioritySettings
from ...specializers.shelf.base_model import cache_folder
from .engine import EngineSettings
from .fleet import FleetSettings, RemoteSettings
from .limits import RunLimits
from .making import MakingSettings
from .ray import RaySettings
from .report import ReportSettings
from .server import ServerSettings
from .tools import ToolSettings

__all__ = ["API_KEY_VARIABLE", "Settings", "load_settings", "setting_value"]

ENVIRONMENT_PREFIX = "METIER_"
API_KEY_VARIABLE = "METIER_API_KEY"
"""The key that `metier serve` asks of its clients, and that we give to a server; never a setting, so never on disk."""

OTHER_VARIABLES = {"METIER_CACHE", "METIER_PLUGIN", "METIER_LORA_KERNEL", "METIER_FIER_KERNEL", API_KEY_VARIABLE}
"""Variables of ours that are switches of their own, not fields."""


class Settings(BaseSettings):
    """Everything a session can be told, with defaults for a small machine.

    In the environment: `METIER_CONCURRENCY=8`, nested `METIER_ENGINE__KV_CACHE_MIB=1024`.

    >>> Settings(concurrency=4, engine={"kv_cache_mib": 1024}).engine.kv_cache_mib
    1024
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__"
    )

    shelf: Path = Field(default_factory=lambda: cache_folder() / "shelf")
    """Folder of the variants. By default `shelf` in the cache folder (METIER_CACHE)."""

    store: Path = Path("runs/runs.db")
    """SQLite file of the runs."""

    concurrency: int = Field(default=16, ge=1, le=10_000)
    """Runs of a batch that go on at the same time."""

    limits: RunLimits = RunLimits()
    """What one run may use."""

    conversation_tokens: int = Field(default=1024, ge=0)
    """Tokens of earlier turns that a conversation shows, counted as three bytes each. Where they become more, the
    oldest turns fall out until half remains."""

    priority: PrioritySettings = PrioritySettings()
    """In what order the asks of concurrent runs are answered."""

    engine: EngineSettings = EngineSettings()
    """What engines are started with."""

    making: MakingSettings = MakingSettings()
    """How variants are made."""

    server: ServerSettings = ServerSettings()
    """What `metier serve` allows."""

    remote: RemoteSettings = RemoteSettings()
    """How long we wait for a server elsewhere."""

    fleet: FleetSettings = FleetSettings()
    """Which servers there are where there are several."""

    ray: RaySettings = RaySettings()
    """How engines run on Ray Serve."""

    tools: ToolSettings = ToolSettings()
    """What calls of tools may use."""

    report: ReportSettings = ReportSettings()
    """What reports and the live page show of single runs."""

    tracing: bool = False
    """Whether spans are sent. OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, …) say where."""

    tracing_texts: bool = False
    """Whether spans have the texts of prompts and answers too, bounded; with `tracing`."""


def load_settings(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read settings: the file (YAML), over it the environment, over it `overrides` (`{"engine.threads": 1}`).

    Raises: SettingsError naming the setting that is unknown or out of range, and close names.

    >>> load_settings(overrides={"engine.threads": 1}).engine.threads
    1
    """
    from_file: dict[str, Any] = {}
    if path is not None:
        from_file = read_yaml_mapping(path, SettingsError, "settings file", "a YAML file of settings and values")
    values = _merge(from_file, _from_environment())
    for name, value in (overrides or {}).items():
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = _merge(values, nested)
    try:
        return Settings(**values)
    except ValidationError as error:
        wrong, first = _explain(error), error.errors()[0]
        place = first["loc"][:-1] if first["type"] == "missing" else first["loc"]
        if path is not None and _stands_in(from_file, place):
            wrong = SettingsError(f"{path}: {wrong.problem}", expected=wrong.expected, remedy=wrong.remedy)
        raise wrong from error


def _stands_in(values: Any, place: tuple[int | str, ...]) -> bool:
    """Whether a value stands at the place of nested mappings and lists."""
    for part in place:
        if isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif isinstance(values, dict) and part in values:
            values = values[part]
        else:
            return False
    return True


def setting_value(where: str, text: str) -> Any:
    """The value of a setting in the environment or on the command line, as YAML; `where` it stands is for errors.

    Raises: SettingsError when it is no value.
    """
    try:
        return parse_yaml(text)
    except UnreadableTextError as error:
        raise SettingsError(
            f"{where[:100]}={shown(text)} cannot be read: {error}",
            expected="a value as in a settings file (YAML)",
            remedy="Correct the value, or quote it for the shell.",
        ) from error


def _from_environment() -> dict[str, Any]:
    """Environment variables as nested values; read here so that misspelt ones fail like misspelt fields."""
    values: dict[str, Any] = {}
    for variable, text in os.environ.items():
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in OTHER_VARIABLES:
            nested: Any = setting_value(variable, text)
            for part in reversed(variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")):
                nested = {part: nested}
            values = _merge(values, nested)
    return values


def _merge(under: dict[str, Any], over: Any) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ValidationError) -> SettingsError:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    name = ".".join(where)
    if first["type"] != "extra_forbidden":
        return SettingsError(f"setting {name}={shown(first['input'])}: {first['msg']}", remedy="Correct the value.")
    model: Any = Settings
    for part in where[:-1]:
        if not part.isdigit():  # a place in a list has the list's own type
            model = _model_in(model.model_fields[part].annotation)
    beside = {field: ".".join([*where[:-1], field]) for field in model.model_fields}
    anywhere = {full.rpartition(".")[2]: full for full in _names(Settings)}
    elsewhere = did_you_mean(where[-1], anywhere, "docs/settings.md lists all settings.", whole=anywhere)
    return SettingsError(
        f"unknown setting {name!r}",
        expected=f"one of {', '.join(beside)}",
        remedy=did_you_mean(where[-1], beside, elsewhere, whole=beside),
    )


def _names(model: Any, prefix: str = "") -> Iterator[str]:
    """Every setting as `--set` takes it."""
    for field, info in model.model_fields.items():
        yield f"{prefix}{field}"
        inner = _model_in(info.annotation)
        if hasattr(inner, "model_fields"):
            yield from _names(inner, f"{prefix}{field}.")


def _model_in(annotation: Any) -> Any:
    """The settings model that a field holds, by itself, in a tuple, or where it is not None."""
    return next((arg for arg in get_args(annotation) if hasattr(arg, "model_fields")), annotation)
