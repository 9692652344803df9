"""The base of settings and records: frozen pydantic models that refuse unknown fields, each explained below it."""

from __future__ import annotations

import ast
import inspect
import textwrap

from pydantic import BaseModel, ConfigDict

__all__ = ["FrozenModel", "explanations"]


class FrozenModel(BaseModel):
    """Base of settings and records: frozen, refuses unknown fields. The string below a field is its explanation."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def explanations(model: type[BaseModel]) -> dict[str, str]:
    """Field → the string below it; a class that repeats a field without one inherits its parent's.

    Read from the source only when called: pydantic's `use_attribute_docstrings` would do so at every import.
    """
    found: dict[str, str] = {}
    for part in reversed(model.__mro__):
        if issubclass(part, BaseModel) and part is not BaseModel:
            found |= _below_fields(part)
    return {name: found[name] for name in model.model_fields if name in found}


def _below_fields(model: type[BaseModel]) -> dict[str, str]:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    except (OSError, TypeError):  # a class without a source file explains nothing
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                found[field.target.id] = " ".join(below.value.value.split())
    return found
