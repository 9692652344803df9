"""Names by content, for variants, records of a probe, graphs and jobs on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

__all__ = ["content_hash"]


def content_hash(content: Any, *, compact: bool = False, as_json: Callable[[Any], Any] | None = None) -> str:
    """16 hex digits of a hash over a JSON value: equal content gives equal names, whatever the order of keys.

    Shelves, journals and stores hold such names, so the same content must always give the same digits.
    Variants and journals name the text without spaces (`compact`), the others with them. `as_json` converts values
    that JSON does not know.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(content, sort_keys=True, separators=separators, default=as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
