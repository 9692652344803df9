"""Answer types as JSON schemas: what a model is asked for, and which types cannot be asked for at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
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
from .held_schema import ONE_SCHEMA, SCHEMA_LISTS, served_schema
from .sample_answer import NoSample, sample_answer

__all__ = [
    "answer_schema",
    "check_answer_type",
    "described_schema",
    "json_kinds",
    "refs_of",
]

TYPES_KEPT = 1000
"""Answer types whose schemas are kept made; every ask of a role has the same."""

MAX_SCHEMA_CHARACTERS = 200_000
"""Longest schema of an answer type: grammars of longer ones take the engine seconds."""

MAX_SCHEMA_NESTING = 64
"""Deepest nesting of a schema that vLLM takes."""

MAX_SHOWN_CHARACTERS = 200
"""Longest part of a type or a value that an error shows."""

_KINDS = ("object", "array", "string", "number", "boolean", "null")
_KIND_OF = {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null", list: "array"}
_INTEGER_NAME = "^-?(0|[1-9][0-9]{0,17})$"
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
    return None if gives is str else served_schema(described_schema(gives))


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


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    for name in ONE_SCHEMA:
        if name in schema:
            yield schema[name]
    for name in SCHEMA_LISTS:
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
