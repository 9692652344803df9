"""Values as a run records them: JSON that is read back as the same value, and types for which there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainSerializer,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    TypeAdapter,
    ValidationError,
    WrapSerializer,
)
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core import to_json

from .errors import GraphError
from .roles import type_name

__all__ = ["as_json", "check_recordable", "dump", "in_one_order", "load", "type_adapter"]

_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)
_ANY_BYTES: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_bytes="base64"))
_SECRETS = (SecretStr, SecretBytes, Secret)


@cache
def type_adapter(kind: Any) -> TypeAdapter[Any]:
    """The pydantic adapter of a type, made once."""
    return TypeAdapter(type(None) if kind is None else kind)


def as_json(value: Any) -> str:
    """A value of any type as JSON for people and models: sets in one order, bytes that are no text in base64."""
    try:
        return _one_text(value, _ANYTHING)
    except ValueError:
        return _one_text(value, _ANY_BYTES)


def _one_text(value: Any, kind: TypeAdapter[Any]) -> str:
    text = kind.dump_json(value).decode()
    if "[" not in text:
        return text
    plain = kind.dump_python(value, mode="json")
    ordered = in_one_order(value, plain)
    return text if ordered == plain else to_json(ordered, inf_nan_mode="null").decode()


def dump(value: Any, kind: Any) -> tuple[Any, str]:
    """A value of type `kind` as JSON, and as `load` reads it back.

    Fields go by their own names, whatever aliases they have; NaN and infinity are kept. The value read back is the
    same, or where `kind` says less than the value is (such as `Any`) what `kind` says of it.
    Raises: ValueError when it cannot be written or read back, or is read back as an object of another model or without
    some of its fields.
    """
    problem: ValueError | None = None
    less: tuple[Any, str] | None = None
    for round_trip in (False, True):  # the second leaves out computed fields and writes `Json` fields as text
        text = _as_json(value, kind, round_trip)
        try:
            back = load(text, kind)
        except ValidationError as error:
            problem = problem or error
            continue
        # Neither NaN nor what holds it is equal to itself.
        same = back == value or repr(back) == repr(value)
        if same or (_holds_sets(kind) and type(back) is type(value) and _as_json(back, kind, round_trip) == text):
            return value, text
        if not _is_other_model(value, back):
            less = less or (back, text)
        problem = ValueError(f"its JSON is read back as {_shorten(repr(back))}")
    if less is not None:
        return less
    assert problem is not None
    raise problem


def _as_json(value: Any, kind: Any, round_trip: bool) -> str:
    adapter = type_adapter(kind)
    plain = adapter.dump_python(value, mode="json", by_alias=False, round_trip=round_trip, warnings=False)
    plain = in_one_order(value, plain) if _holds_sets(kind) else plain
    return to_json(plain, inf_nan_mode="constants").decode()


@cache
def _holds_sets(kind: Any) -> bool:
    """Whether values of a type hold sets, whose order differs from process to process."""
    return "'uniqueItems': True" in str(_schema(kind))


def _schema(kind: Any) -> dict[str, Any]:
    try:
        return type_adapter(kind).json_schema(mode="serialization")
    except PydanticInvalidForJsonSchema:
        return {}


def in_one_order(value: Any, plain: Any) -> Any:
    """`plain` (a value as JSON's types) with what is a set in `value` in one order, the same in every process."""
    if isinstance(value, RootModel):
        return in_one_order(value.root, plain)
    if isinstance(value, BaseModel) and isinstance(plain, dict):
        return {name: in_one_order(_field_of(value, name), part) for name, part in plain.items()}
    if dataclasses.is_dataclass(value) and isinstance(plain, dict):
        return {name: in_one_order(getattr(value, name, None), part) for name, part in plain.items()}
    if isinstance(value, Mapping) and isinstance(plain, dict) and len(value) == len(plain):
        return {name: in_one_order(v, p) for v, (name, p) in zip(value.values(), plain.items(), strict=True)}
    if isinstance(value, Set | Sequence) and isinstance(plain, list) and len(value) == len(plain):
        parts = [in_one_order(v, p) for v, p in zip(value, plain, strict=True)]
        return sorted(parts, key=_plain_text) if isinstance(value, Set) else parts
    return plain


def _field_of(model: BaseModel, name: str) -> Any:
    """The value that was written under a name: a field's own, or its alias."""
    fields = type(model).model_fields
    own = name if name in fields else next((n for n, f in fields.items() if name == f.serialization_alias), name)
    return getattr(model, own, None)


def _plain_text(plain: Any) -> bytes:
    return to_json(plain, inf_nan_mode="constants")


def load(text: str, kind: Any) -> Any:
    """Read back what `dump` wrote, also as earlier versions wrote it (by alias, or with computed fields).

    Raises: ValidationError when it is no value of `kind`.
    """
    ways: tuple[tuple[bool, Literal["allow", "ignore", "forbid"] | None], ...]
    ways = ((False, "forbid"), (True, "forbid"), (False, None), (True, None), (False, "ignore"))
    first: ValidationError | None = None
    for by_alias, extra in ways:
        try:
            return type_adapter(kind).validate_json(text, by_alias=by_alias, by_name=not by_alias, extra=extra)
        except ValidationError as error:
            # What is said is why it does not fit the type as declared.
            first = error if first is None or (by_alias, extra) == (False, None) else first
    assert first is not None
    raise first


def check_recordable(kind: Any, owner: str) -> None:
    """Raise GraphError naming `owner` and the field when values of a type cannot be recorded for a resume."""
    for field, why in _unrecordable(kind, "", set()):
        raise GraphError(
            f"{owner} has {field or type_name(kind)}, which {why}",
            expected="values that a run can record, so that it can be resumed",
            remedy="Keep secrets out of values: read them where they are used, such as in a function step. "
            "Other fields: leave out `exclude`.",
        )


def _unrecordable(kind: Any, at: str, seen: set[Any]) -> Iterator[tuple[str, str]]:
    """Where in a type something is that its JSON leaves out, and what."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    named = get_origin(kind) or kind
    if isinstance(named, type) and issubclass(named, _SECRETS):
        yield at, f"is a {named.__name__}: it is written as '**********'"
        return
    for part in get_args(kind):
        yield from _unrecordable(part, at, seen)
    alias = getattr(named, "__value__", None)  # `type Name = …`
    if not isinstance(named, type) and alias is None or named in seen:
        return
    seen.add(named)
    if alias is not None:
        yield from _unrecordable(alias, at, seen)
        return
    if issubclass(named, BaseModel):
        yield from _in_model(named, seen)
    elif dataclasses.is_dataclass(named) or issubclass(named, dict | tuple):
        for name, part in _hints(named).items():
            yield from _unrecordable(part, f"{named.__name__}.{name}", seen)


def _in_model(model: type[BaseModel], seen: set[Any]) -> Iterator[tuple[str, str]]:
    own = model.__pydantic_decorators__
    written = {name for serializer in own.field_serializers.values() for name in serializer.info.fields}
    for name, field in model.model_fields.items():
        at = f"{model.__name__}.{name}"
        if field.exclude or field.exclude_if is not None:
            yield at, "is excluded from its JSON"
        elif own.model_serializers or name in written or "*" in written:
            continue  # how it is written is the workflow's own
        elif not any(isinstance(part, PlainSerializer | WrapSerializer) for part in field.metadata):
            yield from _unrecordable(field.annotation, at, seen)


def _hints(named: type) -> dict[str, Any]:
    try:
        return get_type_hints(named, include_extras=True)
    except (NameError, TypeError):  # names that only exist where the class was written
        return {}


def _is_other_model(had: Any, has: Any) -> bool:
    """Whether an object came back as one of another model, such as another member of a union."""
    if isinstance(has, BaseModel):
        if not isinstance(had, type(has)) or type(had).model_fields.keys() - type(has).model_fields.keys():
            return True
        return any(_is_other_model(getattr(had, name), getattr(has, name)) for name in type(has).model_fields)
    if isinstance(has, dict) and isinstance(had, dict):
        return any(_is_other_model(had.get(key), part) for key, part in has.items())
    if isinstance(has, list | tuple) and isinstance(had, list | tuple):
        return any(_is_other_model(one, other) for one, other in zip(had, has, strict=False))
    return False


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"
