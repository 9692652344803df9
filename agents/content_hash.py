"""Names by content: what variants, records of a probe, graphs and jobs are known by on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

__all__ = ["content_hash"]


def content_hash(content: Any, *, compact: bool = False, as_json: Callable[[Any], Any] | None = None) -> str:
    """16 hex digits that name what JSON can hold: equal content, equal name, in whatever order its keys were given.

    Shelves, journals and stores are full of such names, so the same content has to give the same digits for good.
    Variants and journals name the text without spaces (`compact`), the others with them. `as_json` turns what JSON
    does not know into what it does.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(content, sort_keys=True, separators=separators, default=as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
