"""An answer type's shape in words, as prompts and corrections show it: what the grammar holds, and what it cannot."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import BaseModel

from .answer_schema import described_schema, refs_of

__all__ = ["AnswerShape", "answer_shape"]

SHAPES_KEPT = 1000
"""Answer types whose shapes are kept written; every ask of a role has the same."""

MAX_SHAPE_CHARACTERS = 2000
"""Longest shape. Of a type that needs more, inner objects are written as `{…}`, and in the end the text is cut."""

MAX_CHOICES = 20
"""Values of an enum that are shown."""

MAX_NOTE_CHARACTERS = 200
"""Longest description or pattern that is shown."""

_DEPTHS = (16, 8, 4, 2, 1)
_PLAIN = re.compile(r"\[*(string|integer|number|true or false)(, …\])*")
_FORMATS = {
    "base64": "text in base64",
    "date": 'date like "2026-01-31"',
    "date-time": 'date and time like "2026-01-31T12:00:00Z"',
    "duration": 'duration like "PT1H30M"',
    "email": "e-mail address",
    "json-string": "JSON as text",
    "time": 'time like "12:00:00"',
    "uri": "URL",
}
_RANGES = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
)


class AnswerShape(NamedTuple):
    """A shape as text; `plain` ones have fields of text, numbers and lists of them only, without any rule."""

    text: str
    plain: bool


@lru_cache(SHAPES_KEPT)
def answer_shape(gives: Any) -> AnswerShape:
    """The shape of an answer type, with names as they are read (aliases), choices, bounds and descriptions."""
    schema = described_schema(gives)
    for depth in _DEPTHS:
        text = _Writer(schema.get("$defs", {}), depth).whole(schema)
        if len(text) <= MAX_SHAPE_CHARACTERS:
            break
    return AnswerShape(_cut(text, MAX_SHAPE_CHARACTERS), _is_plain(gives, schema))


def _is_plain(gives: Any, schema: dict[str, Any]) -> bool:
    if not (isinstance(gives, type) and issubclass(gives, BaseModel)):
        return False
    properties = schema.get("properties", {}) if schema.get("type") == "object" else {"": {}}
    words = [_Writer({}, 1).word(part, 0) for part in properties.values()]
    return list(properties) == list(gives.model_fields) and all(map(_PLAIN.fullmatch, words))


class _Writer:
    """Writes schemas as words; objects more than `most` levels deep are not opened."""

    def __init__(self, definitions: dict[str, Any], most: int) -> None:
        self._definitions = definitions
        self._most = most
        self._recursive = {name for name in definitions if name in self._reached(name)}
        self._named: dict[str, None] = {}

    def whole(self, schema: dict[str, Any]) -> str:
        """A whole type; what holds itself is named, and explained behind it."""
        text = self.word(schema, 0)
        explained: set[str] = set()
        while left := [name for name in self._named if name not in explained]:
            explained.add(left[0])
            text += f", where {self._title(left[0])} is {self.word(self._definitions[left[0]], 0)}"
        return text

    def word(self, schema: Any, depth: int) -> str:
        """One type, with its description."""
        if not isinstance(schema, dict):
            return "any JSON" if schema else "nothing"
        note = schema.get("description") if depth else None
        text = self._typed(schema, depth)
        return f"{text} ({_cut(' '.join(note.split()), MAX_NOTE_CHARACTERS)})" if note else text

    def _typed(self, schema: dict[str, Any], depth: int) -> str:
        if "$ref" in schema:
            return self._definition(schema["$ref"].rpartition("/")[2], depth)
        if "const" in schema or "enum" in schema:
            return _choices(schema.get("enum", [schema.get("const")]))
        for name in ("anyOf", "oneOf", "allOf"):
            if name in schema:
                return " or ".join(dict.fromkeys(self.word(one, depth) for one in schema[name]))
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            return " or ".join(self._typed({**schema, "type": one}, depth) for one in kind)
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return _string(schema)
        if kind in ("integer", "number"):
            return _number(schema, kind)
        return {"boolean": "true or false", "null": "null"}.get(kind or "", "any JSON")

    def _definition(self, name: str, depth: int) -> str:
        if name in self._recursive:
            self._named[name] = None
            return self._title(name)
        described = {key: value for key, value in self._definitions.get(name, {}).items() if key != "description"}
        return self.word(described, depth)

    def _object(self, schema: dict[str, Any], depth: int) -> str:
        if depth >= self._most:
            return "{…}"
        fields = [
            f"{json.dumps(n, ensure_ascii=False)}: {self.word(p, depth + 1)}"
            for n, p in schema.get("properties", {}).items()
        ]
        if not fields or schema.get("patternProperties"):
            for pattern, part in schema.get("patternProperties", {}).items():
                fields.append(f"name matching {_cut(pattern, MAX_NOTE_CHARACTERS)}: {self.word(part, depth + 1)}, …")
            rest = schema.get(
                "additionalProperties", not schema.get("patternProperties") and "properties" not in schema
            )
            if rest is not False:
                fields.append(f"{self._names(schema, depth)}: {self.word(rest, depth + 1)}, …")
        return f"{{{', '.join(fields)}}}{_sizes(schema, 'Properties', 'names')}"

    def _names(self, schema: dict[str, Any], depth: int) -> str:
        names = schema.get("propertyNames")
        return (
            "name"
            if names is None
            else self._typed({"type": "string", **names}, depth + 1).replace("string", "name", 1)
        )

    def _array(self, schema: dict[str, Any], depth: int) -> str:
        first = [self.word(part, depth + 1) for part in schema.get("prefixItems", ())]
        if not first or schema.get("maxItems", len(first) + 1) > len(first):
            first.append(f"{self.word(schema.get('items', True), depth + 1)}, …")
        elif len(first) == schema.get("minItems"):
            return f"[{', '.join(first)}]"
        return f"[{', '.join(first)}]{_sizes(schema, 'Items', 'items')}"

    def _title(self, name: str) -> str:
        title: str = self._definitions[name].get("title", name)
        return title

    def _reached(self, name: str) -> set[str]:
        found: set[str] = set()
        waiting = [name]
        while waiting:
            for ref in refs_of(self._definitions.get(waiting.pop(), {})):
                if ref not in found:
                    found.add(ref)
                    waiting.append(ref)
        return found


def _choices(values: list[Any]) -> str:
    shown = [json.dumps(value, ensure_ascii=False) for value in values[:MAX_CHOICES]]
    more = [f"{len(values) - MAX_CHOICES} others"] if len(values) > MAX_CHOICES else []
    return " or ".join([*shown, *more])


def _string(schema: dict[str, Any]) -> str:
    kind = schema.get("format", "")
    if kind:
        return _FORMATS.get(kind, "UUID" if kind.startswith("uuid") else f"string ({kind})")
    pattern = schema.get("pattern")
    text = "string" if pattern is None else f"string matching {_cut(pattern, MAX_NOTE_CHARACTERS)}"
    return text + _sizes(schema, "Length", "characters")


def _number(schema: dict[str, Any], kind: str) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None:
        bounds = [f"from {least:g} to {most:g}"] if max(abs(least), abs(most)) < 10**6 else [f"from {least} to {most}"]
    else:
        bounds = [f"{words} {schema[name]}" for name, words in _RANGES if name in schema]
    if "multipleOf" in schema:
        bounds.append(f"a multiple of {schema['multipleOf']}")
    return " ".join([kind, ", ".join(bounds)]) if bounds else kind


def _sizes(schema: dict[str, Any], of: str, what: str) -> str:
    least, most = schema.get(f"min{of}"), schema.get(f"max{of}")
    said = [] if least is None and most is None else [_range(least, most, what)]
    if schema.get("uniqueItems"):
        said.append("each once")
    return f" ({', '.join(said)})" if said else ""


def _range(least: int | None, most: int | None, what: str) -> str:
    if most is None:
        return f"at least {least} {what}"
    if least is None:
        return f"at most {most} {what}"
    return f"{least} {what}" if least == most else f"{least} to {most} {what}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
