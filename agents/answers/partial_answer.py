"""Answers that are still being written: objects of the role's type that grow with the text."""

from __future__ import annotations

import json
import re
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import from_json

from ..recorded_values import type_adapter

__all__ = ["NOTHING_YET", "GrowingAnswer"]

NOTHING_YET = object()
"""What there is of an answer before anything of it has come."""

READ_AGAIN_AT = 1.02
"""How much longer a text has to be than when it was last read: reading a long one at every piece would be quadratic."""

_BEGINS = re.compile(r'\{\s*(?:"|\Z)|\[')
_OPEN_NUMBER = re.compile(r"(?<![\w\"])-?[\d.eE+-]+\Z")
_CLOSED_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)


class GrowingAnswer:
    """Reads an answer of type `gives` while its text comes.

    An object is of the role's own type. Its fields that have not come are their defaults, or None, and
    `model_fields_set` says which have; text grows, numbers, dates and choices are there once they are whole. Nothing
    else is checked before the answer is whole: neither bounds nor validators.

    >>> class Plan(BaseModel):
    ...     title: str
    ...     days: int = 0
    >>> growing = GrowingAnswer(Plan)
    >>> growing.add('{"title": "Off to'), growing.add(' sea", "days": 1'), growing.add('2}')
    (Plan(title='Off to', days=0), Plan(title='Off to sea', days=0), Plan(title='Off to sea', days=12))
    """

    def __init__(self, gives: Any) -> None:
        self._gives = gives
        self._text = ""
        self._read_at = 0.0
        self._last: Any = NOTHING_YET

    def add(self, piece: str) -> Any:
        """What there is of the answer with the next piece of its text; `NOTHING_YET` when it is no more than before."""
        self._text += piece
        if len(self._text) < self._read_at:
            return NOTHING_YET
        self._read_at = len(self._text) * READ_AGAIN_AT
        value = self._read()
        if value is NOTHING_YET or (self._last is not NOTHING_YET and value == self._last):
            return NOTHING_YET
        self._last = value
        return value

    def _read(self) -> Any:
        if self._gives is str:
            return self._text.lstrip() or NOTHING_YET
        begins = _BEGINS.search(self._text)
        if begins is None:
            return NOTHING_YET  # a number, a word: whole or not there
        text = self._text[begins.start() :]
        number = _OPEN_NUMBER.search(text)
        if number is not None and '"' not in _CLOSED_STRING.sub("", text):  # not within a string: it may go on
            text = text[: number.start()]
        try:
            return grown(from_json(text, allow_partial="trailing-strings"), self._gives)
        except ValueError:
            return NOTHING_YET


def grown(data: Any, kind: Any) -> Any:
    """What there is of a value of a type, from the JSON data that has come of it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return grown(data, arguments[0])
    if origin in (Union, UnionType):
        found = [value for one in arguments if (value := grown(data, one)) is not NOTHING_YET]
        return max(found, key=_fields_known, default=NOTHING_YET)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _grown_model(data, kind)
    if origin is list and isinstance(data, list):
        items = [grown(item, arguments[0]) for item in data]
        return [item for item in items if item is not NOTHING_YET]
    if origin is dict and isinstance(data, dict):
        values = {name: grown(value, arguments[1]) for name, value in data.items()}
        return {name: value for name, value in values.items() if value is not NOTHING_YET}
    try:
        return type_adapter(kind).validate_json(json.dumps(data))
    except (ValidationError, ValueError):
        return NOTHING_YET


def _grown_model(data: Any, kind: type[BaseModel]) -> Any:
    if issubclass(kind, RootModel):
        root = grown(data, kind.model_fields["root"].annotation)
        return NOTHING_YET if root is NOTHING_YET else kind.model_construct(root)
    if not isinstance(data, dict):
        return NOTHING_YET
    come = {}
    for name, field in kind.model_fields.items():
        written = next((one for one in (field.validation_alias, field.alias, name) if one in data), None)
        value = NOTHING_YET if written is None else grown(data[written], field.annotation)
        if value is not NOTHING_YET:
            come[name] = value
    if not come:
        return NOTHING_YET  # just begun, or another object: the call of a tool, another choice of a union
    missing = {name: None for name, field in kind.model_fields.items() if name not in come and field.is_required()}
    made = kind.model_construct(_fields_set=set(come))
    made.__dict__.update({**missing, **come})
    return made


def _fields_known(value: Any) -> int:
    return len(value.model_fields_set) if isinstance(value, BaseModel) else 0
