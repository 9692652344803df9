"""Strict JSON for requests: finite numbers, whole characters, bounded depth."""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["NotStrictError", "check_body", "check_json"]

MAY_BE_ODD = re.compile(r"\\u[dD][89a-fA-F]|NaN|Infinity|[eE]\+?0*[0-9]{3}|[0-9]{309}")
"""Without any of these, and with few brackets, a text needs no closer look."""


class NotStrictError(ValueError):
    """JSON that Python reads and others do not, or that is nested too deep."""


def check_body(text: str, max_depth: int) -> None:
    """What `check_json` does, for the body of a request, in which no field may stand twice either.

    JSON leaves open which of the two counts, so what checks a request and what serves it could read different ones.
    """
    check_json(text, max_depth)
    try:
        json.loads(text, object_pairs_hook=_each_once)
    except NotStrictError:
        raise
    except (ValueError, RecursionError):
        return  # no JSON: whoever reads it says so


def check_json(text: str, max_depth: int) -> None:
    """Raise NotStrictError for JSON text that holds what cannot be kept or passed on; other texts are left alone.

    That is NaN, an infinity (also one written as 1e999), half of a surrogate pair, or more than `max_depth` levels.
    """
    if not MAY_BE_ODD.search(text) and text.count("[") + text.count("{") <= max_depth:
        return
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except NotStrictError:
        raise
    except RecursionError as error:
        raise NotStrictError(f"it has more than {max_depth} levels") from error
    except ValueError:
        return  # no JSON: whoever reads it says so
    _check(value, max_depth)


def _check(value: Any, max_depth: int) -> None:
    level, depth = [value], 0
    while level:
        inner: list[Any] = []
        for one in level:
            if isinstance(one, str):
                _check_characters(one)
            elif isinstance(one, list):
                inner.extend(one)
            elif isinstance(one, dict):
                inner.extend(one.values())
                _check_characters("".join(one))
        depth += any(isinstance(one, list | dict) for one in level)
        if depth > max_depth:
            raise NotStrictError(f"it has more than {max_depth} levels")
        level = inner


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise NotStrictError(f"a text holds {half!r}, one half of a surrogate pair") from error


def _each_once(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) == len(pairs):
        return
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise NotStrictError(f"field {name[:100]!r} is there twice")
        seen.add(name)


def _refuse_constant(name: str) -> float:
    raise NotStrictError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise NotStrictError(f"the number {digits[:40]} is beyond every finite one")
    return value
