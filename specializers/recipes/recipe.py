"""Recipes: what a variant is made from, checked whole when loaded.

A recipe file is YAML:

    name: solver
    parent: base                      # or the name or id of a variant on the shelf
    seed: 0
    data:
      program: ../puzzles.py:solver_rows   # or  traffic: rows.jsonl
      size: 6000                           # or  role: solver, min_score: 1.0
    methods:
      - method: lora
        rank: 8
    accept:                           # keep a method's result only if it holds the role's quality
      role: ../puzzles.py:solver
      data: {program: ../puzzles.py:solver_tune_rows, size: 200}
      margin: 0.03

Paths are relative to the recipe's folder.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from ...agents.errors import RecipeError, TaskSetError, did_you_mean
from ...agents.frozen_model import FrozenModel
from ...agents.text_files import MOST_SEED, read_yaml_mapping, shown
from ...agents.traffic import TrafficRow, read_traffic
from ...agents.user_code import load_named, told_with_users_line
from ..methods.asked_role import NAMED, RoleSettings
from ..methods.method import find_method

__all__ = ["Acceptance", "ProgramData", "Recipe", "TrafficData", "load_recipe", "read_rows"]


class TrafficData(FrozenModel):
    """Rows from a traffic file.

    >>> TrafficData(traffic="rows.jsonl", role="solver").min_score
    1.0
    """

    traffic: str
    """The file, as `metier run --export-traffic` writes it, relative to the recipe's folder."""

    role: str | None = None
    """Only rows of this role. None is all."""

    min_score: float = Field(default=1.0, ge=0.0, le=1.0)
    """Only rows whose run scored at least this, 0 to 1."""


class ProgramData(FrozenModel):
    """Rows from a Python function.

    >>> ProgramData(program="puzzles.py:solver_rows", size=6000).size
    6000
    """

    program: str = Field(pattern=NAMED)
    """`file.py:function`, called as `function(size=…, seed=…)`, relative to the recipe's folder."""

    size: int = Field(ge=1)
    """Rows to ask it for."""


def _kind_of_data(data: Any) -> str | None:
    keys = data if isinstance(data, Mapping) else type(data).model_fields if isinstance(data, BaseModel) else ()
    return next((kind for kind in ("traffic", "program") if kind in keys), None)


Data = Annotated[
    Annotated[TrafficData, Tag("traffic")] | Annotated[ProgramData, Tag("program")], Discriminator(_kind_of_data)
]


class Acceptance(RoleSettings):
    """When a method's result is kept: when it does not lower the score at a role by more than `margin`.

    >>> rows = ProgramData(program="puzzles.py:solver_tune_rows", size=200)
    >>> Acceptance(role="puzzles.py:solver", data=rows, margin=0.02).against is None
    True
    """

    data: Data
    """Rows to ask, each once and greedily: a traffic file or a program."""

    margin: float = Field(default=0.03, ge=0.0, le=1.0)
    """How much lower the mean score may be."""

    against: str | None = None
    """Name of the variant to compare with. None is what the method started from."""


class Recipe(FrozenModel):
    """One variant in the making: parent, seed, data, the methods to apply in order, and when to keep what they make.

    >>> rows = ProgramData(program="puzzles.py:solver_rows", size=6000)
    >>> recipe = Recipe(name="solver", data=rows, methods=[{"method": "lora", "rank": 16}, {"method": "ptq"}])
    >>> [step.method for step in recipe.methods]
    ['lora', 'ptq']
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the variant."""

    parent: str = "base"
    """Name or content id of a variant on the shelf, or `base`."""

    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of everything random, the data program included."""

    data: Data | None = None
    """Rows to train or calibrate on. May be left out where no method looks at any."""

    methods: tuple[SerializeAsAny[BaseModel], ...] = Field(min_length=1)
    """Methods to apply in order, each with its settings."""

    # Recipes without it keep the identity they had before there was one.
    accept: Acceptance | None = Field(default=None, exclude_if=lambda accept: accept is None)
    """When a method's result is kept. None keeps it in any case."""

    folder: Path = Field(default=Path(), exclude=True)
    """Where relative paths start; no part of the recipe's identity."""

    @field_validator("methods", mode="before")
    @classmethod
    def _as_settings(cls, methods: Any) -> Any:
        if not isinstance(methods, list | tuple):
            return methods
        return tuple(_method_settings(m, f"methods[{i}]") for i, m in enumerate(methods))

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        needing = [s for s in self.methods if find_method(s.model_dump()["method"]).needs_data(s)]
        if needing and self.data is None:
            raise RecipeError(
                f"data: missing, and method {needing[0].model_dump()['method']!r} looks at rows",
                expected="`traffic: file.jsonl` or `program: file.py:function`",
                remedy="Add `data` to the recipe.",
            )
        return self


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe file.

    Raises: RecipeError that names the file, the field, its value, what was expected, and for a misspelt field
    the closest name there is.
    """
    content = read_yaml_mapping(path, RecipeError, "recipe", "a YAML file of fields and values")
    if "folder" in content:
        raise RecipeError(f"recipe {path}: unknown field 'folder'", remedy="Remove it.")
    try:
        return Recipe.model_validate({**content, "folder": path.parent})
    except ValidationError as error:
        raise _as_recipe_error(error, Recipe, f"recipe {path}: ") from error
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error.problem}", expected=error.expected, remedy=error.remedy) from error


def read_rows(recipe: Recipe, data: TrafficData | ProgramData | None = None) -> list[TrafficRow]:
    """Read or generate the recipe's training rows, or other `data` of it, in a fixed order; none without data.

    Raises: RecipeError when the file, the function or what it gives cannot be used, or no row is left.
    """
    data = data or recipe.data
    if data is None:
        return []
    rows = _traffic_rows(recipe, data) if isinstance(data, TrafficData) else _program_rows(recipe, data)
    if not rows:
        raise RecipeError(
            f"recipe {recipe.name!r}: data {data.model_dump()} gives no rows",
            expected="at least one row",
            remedy="Check the role's name and min_score, or what the program yields.",
        )
    return rows


def _traffic_rows(recipe: Recipe, data: TrafficData) -> list[TrafficRow]:
    path = recipe.folder / data.traffic
    if not path.is_file():
        raise RecipeError(
            f"recipe {recipe.name!r}: data.traffic {data.traffic!r} is no file",
            expected=f"a traffic file at {path}",
            remedy="Write one with `metier run WORKFLOW.py --tasks train:24 --export-traffic FILE`, or mend the path.",
        )
    try:
        return [
            row
            for row in read_traffic(path)
            if data.role in (None, row.role) and (row.score is not None and row.score >= data.min_score)
        ]
    except TaskSetError as error:
        raise RecipeError(error.problem, expected=error.expected, remedy=error.remedy) from error


def _program_rows(recipe: Recipe, data: ProgramData) -> list[TrafficRow]:
    where = f"recipe {recipe.name!r}: data.program {data.program!r}"
    function = load_named(recipe.folder, data.program, where, "function", callable)
    try:
        rows = list(function(size=data.size, seed=recipe.seed))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{where} raised {told_with_users_line(error, recipe.folder)}",
            expected="a function of size and seed that yields TrafficRow",
            remedy="Correct the program, or install what it needs.",
        ) from error
    wrong = next((row for row in rows if not isinstance(row, TrafficRow)), None)
    if wrong is not None:
        raise RecipeError(f"{where} yields {type(wrong).__name__}", expected="TrafficRow")
    return rows


def _method_settings(method: Any, where: str) -> BaseModel:
    if isinstance(method, BaseModel):
        return method
    if not isinstance(method, Mapping) or "method" not in method:
        problem = f"{where} is {shown(method)}"
        raise RecipeError(problem, expected="fields with a `method`", remedy="Write `- method: lora`.")
    settings = find_method(str(method["method"])).settings
    try:
        return settings.model_validate(dict(method))
    except ValidationError as error:
        raise _as_recipe_error(error, settings, f"{where}.") from error


def _as_recipe_error(error: ValidationError, model: type[BaseModel], prefix: str) -> RecipeError:
    first = error.errors(include_url=False)[0]
    location = list(first["loc"])
    for place in range(len(location) - 1):
        if location[place] == "data" and location[place + 1] in ("traffic", "program"):
            del location[place + 1]  # pydantic's tag of the chosen kind of data, which is not in the file
            break
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return RecipeError(
            f"{prefix}{path}: unknown field with value {shown(first['input'])}",
            expected=f"one of {', '.join(known)}",
            remedy=did_you_mean(str(location[-1]), known, "Remove it."),
        )
    if first["type"] == "missing":
        return RecipeError(f"{prefix}{path}: missing", expected="a value", remedy="Add the field.")
    if first["type"].startswith("union_tag"):
        return RecipeError(
            f"{prefix}{path}: {shown(first['input'])} names no source of rows",
            expected="`traffic: file.jsonl` or `program: file.py:function`",
        )
    return RecipeError(f"{prefix}{path}: {shown(first['input'])}", expected=first["msg"], remedy="Correct the value.")


def _fields_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    found: list[type[BaseModel]] = [model]
    for part in location:
        found = [inner for m in found if part in m.model_fields for inner in _models(m.model_fields[part].annotation)]
    return [name for m in found for name, field in m.model_fields.items() if not field.exclude]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [model for inner in get_args(annotation) for model in _models(inner)]
    return []
