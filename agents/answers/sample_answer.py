"""One value that a JSON schema allows, found without a model: whether there is any, and what it looks like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

__all__ = ["NoSample", "sample_answer"]

FORMATS = {
    "base64": "/w==", "date": "2026-01-31", "date-time": "2026-01-31T12:00:00Z", "duration": "PT1H",
    "email": "ann@example.org", "ipv4": "192.0.2.1", "ipv6": "2001:db8::1", "ipvanyaddress": "192.0.2.1",
    "ipv4network": "192.0.2.0/24", "ipv6network": "2001:db8::/32", "ipvanynetwork": "192.0.2.0/24",
    "ipv4interface": "192.0.2.1/24", "ipv6interface": "2001:db8::1/32", "ipvanyinterface": "192.0.2.1/24",
    "time": "12:00:00Z", "uri": "https://example.org/", "uuid": "12345678-1234-4234-8234-123456789abc",
}  # fmt: skip


class NoSample(Exception):
    """There is no value, or none that ends."""


def sample_answer(schema: dict[str, Any]) -> Any:
    """A value that a schema allows, with all its optional fields that end; patterns are not looked at.

    Raises: NoSample when there is none: a type that holds itself without end, an empty choice, bounds that cross.
    """
    return _Sampler(schema.get("$defs", {})).sample(schema)


class _Sampler:
    def __init__(self, definitions: dict[str, Any]) -> None:
        self._definitions = definitions
        self._open: set[str] = set()
        self._known: dict[str, Any] = {}

    def sample(self, schema: Any) -> Any:
        if schema is True:
            return None
        if schema is False:
            raise NoSample("nothing is allowed")
        if "$ref" in schema:
            return self._definition(schema["$ref"].rpartition("/")[2])
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            if not schema["enum"]:
                raise NoSample("its choice is empty")
            return schema["enum"][0]
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._first(schema[name])
        if "allOf" in schema:
            return self.sample(schema["allOf"][0])
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            return self._first([{**schema, "type": one} for one in kind])
        makers: dict[Any, Callable[[dict[str, Any]], Any]]
        makers = {"object": self._object, "array": self._array, "string": self._string}
        makers |= {"integer": _number, "number": _number}
        return makers[kind](schema) if kind in makers else kind == "boolean" or None

    def _definition(self, name: str) -> Any:
        """The value of a definition; one that is begun and not finished is not a way to end."""
        if name in self._known:
            return self._known[name]
        if name in self._open:
            raise NoSample(f"{name} holds itself without end")
        self._open.add(name)
        try:
            self._known[name] = self.sample(self._definitions.get(name, True))
        finally:
            self._open.discard(name)
        return self._known[name]

    def _first(self, schemas: list[Any]) -> Any:
        problem = NoSample("its choice is empty")
        for one in schemas:
            try:
                return self.sample(one)
            except NoSample as error:
                problem = error
        raise problem

    def _object(self, schema: dict[str, Any]) -> dict[str, Any]:
        made = {}
        required = schema.get("required", ())
        for name, part in schema.get("properties", {}).items():
            try:
                made[name] = self.sample(part)
            except NoSample:
                if name in required:
                    raise
        fewest = schema.get("minProperties", 0)
        names = schema.get("propertyNames", {})
        choice = names.get("enum") or self._definitions.get(names.get("$ref", "").rpartition("/")[2], {}).get("enum")
        for number in range(len(made), fewest):
            name = str(choice[number]) if choice and number < len(choice) else str(number)
            made[name] = self.sample(schema.get("additionalProperties", True))
        _check_bounds(fewest, schema.get("maxProperties", math.inf))
        return made

    def _array(self, schema: dict[str, Any]) -> list[Any]:
        made = [self.sample(part) for part in schema.get("prefixItems", ())]
        fewest = schema.get("minItems", 0)
        _check_bounds(fewest, schema.get("maxItems", math.inf))
        if len(made) < fewest or (not made and schema.get("maxItems", 1) > 0):
            try:
                item = self.sample(schema.get("items", True))
            except NoSample:
                if fewest:
                    raise
                return made
            made += [item] * (max(fewest, 1) - len(made))
        return made

    def _string(self, schema: dict[str, Any]) -> str:
        if "contentSchema" in schema:
            return json.dumps(self.sample(schema["contentSchema"]))
        fewest, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        _check_bounds(fewest, most)
        text = FORMATS.get(schema.get("format", "")[:-1] if "uuid" in schema.get("format", "") else "")
        text = text or FORMATS.get(schema.get("format", ""), "a")
        return text if fewest <= len(text) <= most else "a" * int(fewest)


def _number(schema: dict[str, Any]) -> float:
    kind = schema["type"]
    low = schema.get("minimum", -math.inf)
    high = schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    step = schema.get("multipleOf", 1 if kind == "integer" else 0)
    for bound in (0, low, high, above, below, (max(low, above) + min(high, below)) / 2):
        if not math.isfinite(bound):
            continue
        near = [bound] if not step else [step * (math.floor(bound / step) + n) for n in (-1, 0, 1, 2)]
        near += [] if step else [bound - 1, bound + 1]
        for number in near:
            if low <= number <= high and above < number < below:
                return int(number) if kind == "integer" else number
    raise NoSample("its bounds leave no number")


def _check_bounds(least: float, most: float) -> None:
    if least > most:
        raise NoSample(f"at least {least} and at most {most}")
