"""Answer types as JSON schemas: what a model is asked for, and which types cannot be asked for at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from ..errors import GraphError
from ..recorded_values import dump, type_adapter
from ..roles import type_name
from .sample_answer import NoSample, sample_answer

__all__ = [
    "SERVED_FORMATS",
    "answer_schema",
    "check_answer_type",
    "described_schema",
    "held_schema",
    "json_kinds",
    "refs_of",
]

TYPES_KEPT = 1000
"""Answer types whose schemas are kept made; every ask of a role has the same."""

MAX_SCHEMA_CHARACTERS = 200_000
"""Longest schema of an answer type: grammars of longer ones take the engine seconds."""

MAX_SCHEMA_NESTING = 64
"""Deepest nesting of a schema that vLLM takes."""

MAX_REPEATS = 100
"""Largest `{n}` of a pattern that the grammar holds; each repeat is a state of its own."""

MAX_SHOWN_CHARACTERS = 200
"""Longest part of a type or a value that an error shows."""

LARGEST_BOUND = 2**63 - 1
"""Largest bound of a number that the grammar holds."""

SERVED_FORMATS = frozenset(
    ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
)
"""Formats of text that the grammar holds. Of others, and of everything else that it cannot hold, the type is left to
judge, once the answer is there."""

_UUIDS = {
    f"uuid{n}": rf"^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{n}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}$"
    for n in range(1, 9)
}
_KINDS = ("object", "array", "string", "number", "boolean", "null")
_KIND_OF = {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null", list: "array"}
_INTEGER_NAME = "^-?(0|[1-9][0-9]{0,17})$"
_NOT_HELD = (
    "contains", "contentEncoding", "contentMediaType", "contentSchema", "dependentRequired", "dependentSchemas", "else",
    "if", "maxContains", "minContains", "not", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
    "writeOnly",
)  # fmt: skip
_ONE_SCHEMA = ("additionalProperties", "items", "propertyNames")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED_SCHEMAS = ("$defs", "patternProperties", "properties")
_ODD_PATTERN = re.compile(r"\(\?(?!:)|\\[^dDwWsStnr\-\]\[(){}.*+?^$|\\/]|[*+?}][+?]")
_ANCHOR_INSIDE = re.compile(r"(?<!\\)(?:\\\\)*[\^$]")
_CHARACTER_CLASS = re.compile(r"\[(?:[^\]\\]|\\.)*\]")
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
# What pydantic says when JSON has not the structure that a type reads, whatever its values are.
_STRUCTURE = re.compile(
    r"missing|extra_forbidden|is_\w+|needs_python_object|missing_argument|unexpected_\w+_argument|"
    r"union_tag_\w+|\w+_type"
)


@lru_cache(TYPES_KEPT)
def described_schema(gives: Any) -> dict[str, Any]:
    """The JSON schema of an answer type with all that it says; names are the ones that the type reads (aliases)."""
    return type_adapter(gives).json_schema(mode="validation", schema_generator=_AnswerSchema)


@lru_cache(TYPES_KEPT)
def answer_schema(gives: Any) -> dict[str, Any] | None:
    """The JSON schema that an answer of a type is asked for with, None for free text.

    It says no more than the grammars of vLLM hold: an answer is validated by its type anyway.
    """
    return None if gives is str else held_schema(described_schema(gives))


@lru_cache(TYPES_KEPT)
def json_kinds(gives: Any) -> frozenset[str]:
    """What a type's JSON may be: `object`, `array`, `string`, `number`, `boolean`, `null`."""
    schema = described_schema(gives)
    return frozenset(_kinds(schema, schema.get("$defs", {}), set()))


def check_answer_type(gives: Any, owner: str) -> None:
    """Raise GraphError naming `owner` when a model cannot be asked for a type, or its answer not be recorded."""
    if gives is str:
        return
    name = type_name(gives)[:MAX_SHOWN_CHARACTERS]
    try:
        schema = described_schema(gives)
    except (PydanticUserError, PydanticInvalidForJsonSchema, NameError) as error:
        raise _refused(owner, name, str(error).split("\n")[0]) from error
    _check_size(answer_schema(gives), owner, name)
    for model, field in _unreadable_names(gives):
        raise _refused(owner, name, f"{model}.{field} is read from inside another field (AliasPath)")
    try:
        sample = json.dumps(sample_answer(schema))
    except NoSample as error:
        raise _refused(owner, name, f"no JSON is a value of it: {error}") from error
    shown = sample[:MAX_SHOWN_CHARACTERS]
    try:
        value = type_adapter(gives).validate_json(sample)
    except ValidationError as error:
        found = error.errors(include_url=False)
        if all(_STRUCTURE.fullmatch(one["type"]) for one in found):
            where = ".".join(map(str, found[0]["loc"]))
            raise _refused(
                owner, name, f"its schema allows {shown}, which it refuses: {where} {found[0]['msg']}"
            ) from error
        return  # what its own rules want is theirs to say
    try:
        dump(value, gives)
    except ValueError as error:
        raise _refused(owner, name, f"a run cannot record {shown} as a value of it: {error}") from error


def refs_of(schema: Any) -> Iterator[str]:
    """The names of the definitions that a schema refers to."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rpartition("/")[2]
        for part in _parts(schema):
            yield from refs_of(part)


def _kinds(schema: Any, definitions: dict[str, Any], seen: set[str]) -> set[str]:
    if not isinstance(schema, dict):
        return set(_KINDS)
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in seen:
            return set()
        return _kinds(definitions.get(name), definitions, {*seen, name})
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return {kind for one in schema[name] for kind in _kinds(one, definitions, seen)}
    if "const" in schema or "enum" in schema:
        return {_KIND_OF.get(type(value), "object") for value in schema.get("enum", [schema.get("const")])}
    kinds = schema.get("type", "object" if "properties" in schema else list(_KINDS))
    return {"number" if kind == "integer" else kind for kind in ([kinds] if isinstance(kinds, str) else kinds)}


def _refused(owner: str, name: str, why: str) -> GraphError:
    return GraphError(
        f"{owner} is {name}, which no model can be asked for: {why}",
        expected="str, or a type that pydantic reads from JSON and writes as the same JSON",
        remedy="Give a pydantic model, numbers, enums, or lists, dicts and unions of them.",
    )


def _check_size(schema: Any, owner: str, name: str) -> None:
    characters = len(json.dumps(schema))
    if characters > MAX_SCHEMA_CHARACTERS:
        raise _refused(
            owner, name, f"its schema has {characters} characters, at most {MAX_SCHEMA_CHARACTERS} are served"
        )
    nesting = _nesting(schema)
    if nesting > MAX_SCHEMA_NESTING:
        raise _refused(owner, name, f"its schema nests {nesting} levels deep, at most {MAX_SCHEMA_NESTING} are served")


def _nesting(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_nesting, inner), default=0)


class _AnswerSchema(GenerateJsonSchema):
    """pydantic's schemas, where they say what is read from JSON more exactly than pydantic's own do."""

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        made = super().dict_schema(schema)
        if schema.get("keys_schema", {}).get("type") == "int":
            made.setdefault("propertyNames", {"pattern": _INTEGER_NAME})
        return made

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
        made = super().decimal_schema(schema)
        return next((one for one in made.get("anyOf", []) if one.get("type") == "number"), made)

    def generator_schema(self, schema: core_schema.GeneratorSchema) -> JsonSchemaValue:
        raise PydanticInvalidForJsonSchema("an iterator can be read only once")


def held_schema(schema: Any) -> Any:
    """A schema without what vLLM's grammars do not hold, such as `uniqueItems`; what is asked with it needs a check."""
    if not isinstance(schema, dict):
        return schema
    kept = {name: value for name, value in schema.items() if name not in _NOT_HELD}
    for name in _ONE_SCHEMA:
        if name in kept:
            kept[name] = held_schema(kept[name])
    for name in _SCHEMA_LISTS:
        if name in kept:
            kept[name] = [held_schema(one) for one in kept[name]]
    for name in _NAMED_SCHEMAS:
        if name in kept:
            kept[name] = {key: held_schema(one) for key, one in kept[name].items()}
    for name, holds in _HOLDS.items():
        if name in kept and not holds(kept):
            if name == "format" and kept[name] in _UUIDS:
                kept["pattern"] = _UUIDS[kept[name]]
            del kept[name]
    if "pattern" in kept or "format" in kept:  # xgrammar holds one of the two, and no length beside it
        for name in ("minLength", "maxLength", *(["format"] if "pattern" in kept else [])):
            kept.pop(name, None)
    if len(kept.get("allOf", ())) > 1:
        del kept["allOf"]
    return kept


def _bounded(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda schema: abs(schema[name]) <= LARGEST_BOUND


_HOLDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "format": lambda schema: schema["format"] in SERVED_FORMATS,
    "pattern": lambda schema: _is_plain_pattern(schema["pattern"]),
    "multipleOf": lambda schema: False,
    "patternProperties": lambda s: (
        len(s["patternProperties"]) == 1
        and "properties" not in s
        and all(map(_is_plain_pattern, s["patternProperties"]))
    ),
    "propertyNames": lambda s: not s.keys() & {"properties", "patternProperties"},
    **{name: _bounded(name) for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")},
}


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


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    for name in _ONE_SCHEMA:
        if name in schema:
            yield schema[name]
    for name in _SCHEMA_LISTS:
        yield from schema.get(name, ())
    for name in ("patternProperties", "properties"):
        yield from schema.get(name, {}).values()


def _unreadable_names(gives: Any) -> Iterator[tuple[str, str]]:
    """Fields of an answer type's models that are read from a place which no schema can say."""
    seen: set[Any] = set()
    waiting = [gives]
    while waiting:
        kind = waiting.pop()
        waiting += getattr(kind, "__args__", ())
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or kind in seen:
            continue
        seen.add(kind)
        for name, field in kind.model_fields.items():
            waiting.append(field.annotation)
            if not _is_named(field):
                yield kind.__name__, name


def _is_named(field: FieldInfo) -> bool:
    alias = field.validation_alias
    if alias is None or isinstance(alias, str):
        return True
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
    return any(isinstance(one, str) or (len(one.path) == 1 and isinstance(one.path[0], str)) for one in choices)
