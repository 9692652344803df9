"""From the text that somebody says to the typed input of a workflow or a role."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, TypeAdapter

from .turns import holds_turns

__all__ = ["json_object", "read_said"]


def read_said(kind: Any, text: str) -> Any:
    """A value of type `kind`: from JSON of it, or from plain text where it needs one text only.

    Turns of a model are no part of what is said. Raises: ValueError, also as pydantic's ValidationError.

    >>> from pydantic import BaseModel
    >>> class Question(BaseModel):
    ...     text: str
    >>> read_said(Question, "What is 2 + 2?")
    Question(text='What is 2 + 2?')
    """
    if kind is str:
        return text
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return TypeAdapter(kind).validate_json(text)
    problem: ValueError | None = None
    if json_object(text) is not None:
        try:
            return kind.model_validate_json(text)
        except ValueError as error:
            problem = error
    said = {name: field for name, field in kind.model_fields.items() if not holds_turns(field.annotation)}
    needed = [name for name, field in said.items() if field.is_required()] or list(said)[:1]
    if len(needed) != 1:
        raise problem or ValueError(f"it needs {', '.join(needed) or 'nothing'}")
    try:
        return kind.model_validate({needed[0]: read_said(said[needed[0]].annotation, text)}, by_name=True)
    except ValueError as error:
        raise problem or error from error


def json_object(text: str) -> dict[str, Any] | None:
    """A JSON object, None when the text is something else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
