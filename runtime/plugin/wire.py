"""What crosses from our process into vLLM's: the names of what requests carry, and the plugin's status."""

from __future__ import annotations

import os

__all__ = [
    "FIER_KEY",
    "INTUITION_KEY",
    "LOGITS_PROCESSOR",
    "REASONING_PARSER",
    "STATUS",
    "THINKING_KEY",
    "plugin_status",
    "plugin_wanted",
]

INTUITION_KEY = "metier_intuition"
"""Name under which a request carries its semantic vector to the worker, in `SamplingParams.extra_args`."""

THINKING_KEY = "metier_thinking"
"""The same for what its thinking has to keep to."""

FIER_KEY = "metier_fier"
"""Name under which an engine's retrieval settings reach the plugin, in vLLM's `additional_config`."""

# What our engines are started with, so that asks can think before they answer.
LOGITS_PROCESSOR = "metier.runtime.plugin.thinking.thinking_processor:ThinkingProcessor"
REASONING_PARSER = "metier"

STATUS: dict[str, str] = {}
"""Part of the plugin → what it does in this process; written by `register` alone."""


def plugin_wanted() -> bool:
    """Whether the plugin is switched on in this process and those started from it."""
    return os.environ.get("METIER_PLUGIN", "1") != "0"


def plugin_status() -> dict[str, str]:
    """What each part of the plugin does in this process: part → "active", "off (why)" or "not registered"."""
    return dict(STATUS) if STATUS else {"lora": "not registered (vLLM has not started in this process)"}
