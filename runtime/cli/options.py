"""Options that several verbs take, declared once."""

from __future__ import annotations

from typing import Any

import yaml

from ...agents.errors import SettingsError

__all__ = ["overrides"]


def overrides(pairs: list[str] | None) -> dict[str, Any]:
    """Settings of `--set name=value`; raises SettingsError for what is none."""
    values = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign:
            raise SettingsError(f"--set {pair!r}", expected="name=value, such as engine.kv_cache_mib=1024")
        values[name] = yaml.safe_load(value)
    return values
