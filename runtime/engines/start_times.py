"""How long engines took to start on this machine, so that whoever waits for the next one knows what to expect."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from ...agents.content_hash import content_hash
from ...agents.whole_files import write_whole
from ...specializers.shelf.base_model import cache_folder
from .variant_targets import EngineStart

__all__ = ["note_start", "start_note"]

FILE = "engine_starts.json"
ENGINES_KEPT = 64


def start_note(start: EngineStart) -> str:
    """What is waited for while this engine starts, and how long that took before on this machine.

    A model is compiled when it is first started, which takes far longer than any later start.
    """
    known = _read()
    seconds = known.get(_key(start))
    if seconds is not None:
        return f"loads the model, which took {seconds[1]:.0f} s the last time here"
    if start.settings.runs_eagerly:
        return "loads the model"
    firsts = sorted(first for first, _ in known.values())
    if not firsts:
        return "loads the model and compiles it, once; on machines we know that took one to two minutes"
    least, most = f"{firsts[0]:.0f}", f"{firsts[-1]:.0f}"
    took = least if least == most else f"{least} to {most}"
    return f"loads the model and compiles it if that is its first time; first starts took {took} s here"


def note_start(start: EngineStart, seconds: float) -> None:
    """Remember a start; a cache that cannot be written remembers nothing."""
    known = _read()
    first, _ = known.pop(_key(start), (seconds, seconds))
    known[_key(start)] = (first, seconds)
    newest = dict(list(known.items())[-ENGINES_KEPT:])
    with suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_whole(cache_folder() / FILE, json.dumps(newest))


def _read() -> dict[str, tuple[float, float]]:
    """Engine → seconds of its first start here and of its last, the newest last; what cannot be read is nothing."""
    try:
        found: dict[str, Any] = json.loads((cache_folder() / FILE).read_text(encoding="utf-8"))
        return {str(key): (float(first), float(last)) for key, (first, last) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _key(start: EngineStart) -> str:
    weights, settings = str(start.weights.resolve()), start.settings.model_dump(mode="json")
    return content_hash([weights, start.dtype, start.adapters, settings])
