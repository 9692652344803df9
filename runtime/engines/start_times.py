"""How long engines took to start on this machine: the estimate shown while the next one starts."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import NamedTuple

from pydantic import TypeAdapter

from ...agents.content_hash import content_hash
from ...agents.text_files import read_bounded
from ...agents.whole_files import write_whole
from ...specializers.shelf.base_model import cache_folder
from .variant_targets import EngineStart

__all__ = ["note_start", "start_note"]

FILE = "engine_starts.json"
ENGINES_KEPT = 64
ALIKE = 2.0
"""Models whose weights differ by no more than this factor take about as long to compile."""


def start_note(start: EngineStart) -> str:
    """The line shown while this engine starts: what it does, and how long that took before on this machine.

    A model is compiled when it is first started, which takes far longer than any later start.
    """
    known = _read()
    own = known.get(_key(start))
    if own is not None:
        return f"loads the model, which took {own.last_s:.0f} s the last time here"
    if start.settings.runs_eagerly:
        return "loads the model"
    size = _bytes(start)
    alike = [one.first_s for one in known.values() if one.compiled and size / ALIKE <= one.bytes <= size * ALIKE]
    if not alike:
        return "loads the model and compiles it, once; with 135M parameters that took one to three minutes for us"
    return (
        "loads the model and compiles it if that is its first time; "
        f"a first start with as large a model took up to {max(alike):.0f} s here"
    )


def note_start(start: EngineStart, seconds: float) -> None:
    """Record a start; does nothing where the cache cannot be written."""
    known = _read()
    before = known.pop(_key(start), None)
    first_s = seconds if before is None else before.first_s
    known[_key(start)] = _Starts(first_s, seconds, _bytes(start), not start.settings.runs_eagerly)
    newest = dict(list(known.items())[-ENGINES_KEPT:])
    with suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_whole(cache_folder() / FILE, json.dumps(newest))


class _Starts(NamedTuple):
    """One engine's first start here and its last, the size of its weights, and whether it was compiled."""

    first_s: float
    last_s: float
    bytes: int
    compiled: bool


def _read() -> dict[str, _Starts]:
    """Starts by engine, the newest last; empty when the file cannot be read."""
    try:
        return TypeAdapter(dict[str, _Starts]).validate_json(read_bounded(cache_folder() / FILE))
    except (OSError, ValueError):
        return {}


def _bytes(start: EngineStart) -> int:
    return sum(file.stat().st_size for file in start.weights.glob("*.safetensors"))


def _key(start: EngineStart) -> str:
    weights, settings = str(start.weights.resolve()), start.settings.model_dump(mode="json")
    return content_hash([weights, start.dtype, start.adapters, settings])
