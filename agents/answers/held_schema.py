"""Which grammar holds a schema, and what of a schema no grammar holds.

vLLM makes grammars with xgrammar, and where that cannot hold a rule with guidance (the package `llguidance`), which
holds others: multiples, several schemas at once, a length beside a pattern. Neither holds all rules of JSON schemas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

__all__ = ["ONE_SCHEMA", "SCHEMA_LISTS", "grammar_of", "held_schema", "served_schema", "xgrammar_schema"]

MAX_REPEATS = 100
"""Largest `{n}` of a pattern, and length beside one, that the grammar holds; each repeat is a state of its own."""

LARGEST_BOUND = 2**63 - 1
"""Largest bound of a number that xgrammar holds."""

LARGEST_GUIDANCE_BOUND = 2**53
"""Largest bound of a number that guidance holds."""

LARGEST_MULTIPLE = 1_000_000
"""Largest `multipleOf` that guidance is given."""

SERVED_FORMATS = frozenset(
    ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
)
"""Formats of text that the grammar holds. Of others, and of everything else that it cannot hold, the type is left to
judge, once the answer is there."""

ONE_SCHEMA = ("additionalProperties", "items", "propertyNames")
SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED_SCHEMAS = ("$defs", "patternProperties", "properties")

_UUIDS = {
    f"uuid{n}": rf"^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{n}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}$"
    for n in range(1, 9)
}
_NOT_HELD = (
    "contains", "contentEncoding", "contentMediaType", "contentSchema", "dependentRequired", "dependentSchemas", "else",
    "if", "maxContains", "minContains", "not", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
    "writeOnly",
)  # fmt: skip
_SHARES = (0.5, 0.25, 0.1, 0.01, 0.001)
"""Multiples below 1 that guidance reads as they are written."""
_LENGTHS = ("minLength", "maxLength")
_ODD_PATTERN = re.compile(r"\(\?(?!:)|\\[^dDwWsStnr\-\]\[(){}.*+?^$|\\/]|[*+?}][+?]")
_ANCHOR_INSIDE = re.compile(r"(?<!\\)(?:\\\\)*[\^$]")
_CHARACTER_CLASS = re.compile(r"\[(?:[^\]\\]|\\.)*\]")
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")

Holds = Mapping[str, Callable[[dict[str, Any]], bool]]


def served_schema(schema: Any) -> Any:
    """A schema without what no grammar holds: as xgrammar holds it, or as guidance does, where that holds more."""
    first = held_schema(schema)
    return _held(schema, _GUIDANCE) if _held(first, _GUIDANCE) == first else first


def grammar_of(schema: Any) -> Literal["xgrammar", "guidance"]:
    """Which grammar serves a schema that `served_schema` gave.

    >>> grammar_of({"type": "integer"}), grammar_of({"type": "integer", "multipleOf": 5})
    ('xgrammar', 'guidance')
    """
    return "xgrammar" if held_schema(schema) == schema else "guidance"


def xgrammar_schema(schema: Any) -> Any:
    """What `served_schema` gave, for an engine that may have xgrammar alone; another schema as it is.

    >>> xgrammar_schema({"type": "integer", "multipleOf": 5}), xgrammar_schema({"uniqueItems": True})
    ({'type': 'integer'}, {'uniqueItems': True})
    """
    return held_schema(schema) if served_schema(schema) == schema else schema


def held_schema(schema: Any) -> Any:
    """A schema without what xgrammar does not hold, such as `uniqueItems`; what is asked with it needs a check."""
    return _held(schema, _XGRAMMAR)


def _held(schema: Any, rules: Holds) -> Any:
    if not isinstance(schema, dict):
        return schema
    kept = {name: value for name, value in schema.items() if name not in _NOT_HELD}
    for name in ONE_SCHEMA:
        if name in kept:
            kept[name] = _held(kept[name], rules)
    for name in SCHEMA_LISTS:
        if name in kept:
            kept[name] = [_held(one, rules) for one in kept[name]]
    for name in _NAMED_SCHEMAS:
        if name in kept:
            kept[name] = {key: _held(one, rules) for key, one in kept[name].items()}
    for name, holds in rules.items():
        if name in kept and not holds(kept):
            if name == "format" and kept[name] in _UUIDS:
                kept["pattern"] = _UUIDS[kept[name]]
            del kept[name]
    return kept


def _bounded(name: str, largest: int) -> Callable[[dict[str, Any]], bool]:
    return lambda schema: abs(schema[name]) <= largest


def _bounds(largest: int) -> Holds:
    return {name: _bounded(name, largest) for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")}


def _short_beside_pattern(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda schema: "format" not in schema and ("pattern" not in schema or schema[name] <= MAX_REPEATS)


# In this order: a format of our own becomes a pattern, and pattern and format decide about a length.
_XGRAMMAR: Holds = {
    "pattern": lambda schema: _is_plain_pattern(schema["pattern"]),
    "format": lambda schema: schema["format"] in SERVED_FORMATS and "pattern" not in schema,
    **dict.fromkeys(_LENGTHS, lambda schema: not schema.keys() & {"pattern", "format"}),
    "multipleOf": lambda schema: False,
    "patternProperties": lambda s: (
        len(s["patternProperties"]) == 1
        and "properties" not in s
        and all(map(_is_plain_pattern, s["patternProperties"]))
    ),
    "propertyNames": lambda s: not s.keys() & {"properties", "patternProperties"},
    "allOf": lambda schema: len(schema["allOf"]) < 2,
    **_bounds(LARGEST_BOUND),
}
_GUIDANCE: Holds = {
    "pattern": _XGRAMMAR["pattern"],
    "format": _XGRAMMAR["format"],
    **{name: _short_beside_pattern(name) for name in _LENGTHS},
    "multipleOf": lambda schema: _is_read_exactly(schema["multipleOf"]),
    "patternProperties": lambda schema: False,
    "propertyNames": lambda schema: False,
    "oneOf": lambda schema: "discriminator" in schema,
    **_bounds(LARGEST_GUIDANCE_BOUND),
}


def _is_read_exactly(multiple: float) -> bool:
    return multiple in _SHARES or (multiple % 1 == 0 and 0 < multiple <= LARGEST_MULTIPLE)


def _is_plain_pattern(pattern: str) -> bool:
    """Whether grammars read a pattern as pydantic does: no lookaround, word bounds, back references, many repeats."""
    if _ODD_PATTERN.search(pattern) or any(int(n) > MAX_REPEATS for m in _REPEAT.findall(pattern) for n in m if n):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    plain = _CHARACTER_CLASS.sub("x", pattern)
    inner = plain.removeprefix("^")
    inner = inner[:-1] if inner.endswith("$") and not inner.endswith(r"\$") else inner
    whole = inner != plain and "|" in inner  # `^a|b$` anchors one end of each
    depth = 0
    for character in inner:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if whole and depth == 0 and character == "|":
            return False
    return _ANCHOR_INSIDE.search(inner) is None
