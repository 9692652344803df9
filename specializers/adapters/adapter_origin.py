"""Which base an adapter says it was made for, compared with the one it is to be used on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...agents.errors import AdapterError, BaseModelError
from ...agents.text_files import shown
from ..shelf.base_model import base_fingerprint, cache_folder
from ..shelf.bundled_model import BUNDLED
from .adapter_files import CONFIG

__all__ = ["check_origin"]

_SHOWN_CHARACTERS = 200


def check_origin(folder: Path, config: dict[str, Any], base: str | Path, place: Path) -> str | None:
    """The name of the base in the adapter's config where that is not known to be `base`, which lies in `place`.

    None when they are the same, or the config names none. A name is known when its model is on this machine.
    Raises: AdapterError when it is, and is another model than `base`.
    """
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or named == str(base):
        return None
    other = _on_this_machine(named)
    if other is None:
        return None if Path(named).name in (Path(base).name, place.name) else _printed(named)
    try:
        found = base_fingerprint(other)
    except BaseModelError:  # something of that name, but no model
        return _printed(named)
    if found == base_fingerprint(place):
        return None
    raise AdapterError(
        f"{folder / CONFIG}: base_model_name_or_path is {shown(named)}, whose fingerprint is {found}",
        expected=f"the base in use, {base_fingerprint(place)} ({place.name})",
        remedy=f"Add it with --base {named}; if the two are one model in other formats, correct "
        "base_model_name_or_path.",
    )


def _printed(named: str) -> str:
    return repr(named[:_SHOWN_CHARACTERS])[1:-1]


def _on_this_machine(named: str) -> Path | None:
    """The folder of a local path, of a bundled model already converted, or of a fetched Hugging Face id."""
    try:
        local = Path(named).expanduser()
        if (local / "config.json").is_file():
            return local
    except (OSError, ValueError, RuntimeError):  # no path at all
        return None
    if named in BUNDLED:
        converted = cache_folder() / "bases" / named
        return converted if (converted / "config.json").is_file() else None
    if named.count("/") != 1 or named.startswith(("/", ".", "~")):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(named, "config.json")
    except Exception:  # names that the client refuses, with errors of its own
        return None
    return Path(file).parent if isinstance(file, str) else None
