"""Write docs/settings.md from the settings models: python scripts/write_settings_page.py.

Every name, bound, default and explanation is read from the code, so the page cannot differ from it.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from metier.agents import ThinkingProfile
from metier.agents.frozen_model import explanations
from metier.router import AssignSettings, ProbeSettings, RoleAssignment
from metier.runtime import Settings
from metier.runtime.bench.workload import SyntheticMix
from metier.runtime.simulator import ServingPlan
from metier.specializers import Recipe, TrainingSettings
from metier.specializers.methods.lora import LoraSettings
from metier.specializers.methods.method import METHODS, find_method
from metier.specializers.methods.trex.frozen_gate import FrozenGateSettings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HIDDEN = {("Recipe", "folder")}
"""Fields that a recipe file may not have: load_recipe fills them in."""
PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}
LINKED: dict[Any, str] = {ThinkingProfile: "[thinking](#thinking)"}
"""Models that stand in several places and have a section of their own."""
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

INTRODUCTION = """\
# Settings

Written by `scripts/write_settings_page.py` from the code; change the strings below the fields there.

Settings of a session come from three places. Later ones win:
1. a YAML file, `--settings FILE`;
2. the environment, `METIER_ENGINE__KV_CACHE_MIB=1024`;
3. the command line, `--set engine.kv_cache_mib=1024`, which may be repeated.

From Python: `open_session(settings=load_settings(overrides={"engine.kv_cache_mib": 1024}))`.
Values are YAML, so `null` is none and `[a, b]` a list. An unknown name or a value out of range is refused.
The names of the first sections are those that `--set` takes.
"""


def settings_page() -> str:
    """The whole page."""
    groups = [name for name, field in Settings.model_fields.items() if _models(field.annotation)]
    plain = [name for name in Settings.model_fields if name not in groups]
    sections = [INTRODUCTION, _section("session", Settings, only=plain)]
    for name in groups:
        (model,) = _models(Settings.model_fields[name].annotation)
        sections.append(_section(name, model, prefix=f"{name}."))
    sections += [
        _section(
            "assignment file", RoleAssignment, "What a role may have in the YAML file that `metier assign` writes."
        ),
        _section("thinking", ThinkingProfile, "`thinking: 64` is short for `max_tokens: 64`, `off` for 0."),
        _section(
            "probe",
            ProbeSettings,
            "For `probe` from Python. `metier probe` takes `--batch` (`batch_tasks`) and `--margin`.",
        ),
        _section(
            "assign",
            AssignSettings,
            "For `assign` from Python. `metier assign` takes `--minimise`, `--quality-loss`, `--checks`, "
            "`--measure-baselines` and the limits: `--min-quality`, `--max-cpu-s`, `--max-latency-s`, `--max-tokens`, "
            "`--max-memory-mib`.",
        ),
        _section("recipe", Recipe, "`data` is a traffic file or a program, not both."),
        _section("training", TrainingSettings, "What every method that trains takes in a recipe, besides its own."),
        *(_method_section(name) for name in sorted(METHODS)),
        _section(
            "export of T-REX as LoRA",
            FrozenGateSettings,
            "For `freeze_gate`; `metier variants export --as lora` uses the defaults.",
        ),
        _section("synthetic load", SyntheticMix, "What `metier bench --synthetic N` asks."),
        _section("simulation", ServingPlan, "For `simulate` from Python; `metier simulate --help` has the options."),
    ]
    return "\n".join(sections)


def _method_section(name: str) -> str:
    model = find_method(name).settings
    shared = next(
        (base for base in (LoraSettings, TrainingSettings) if issubclass(model, base) and model is not base), None
    )
    if shared is None:
        return _section(f"method {name}", model)
    own = [field for field in model.model_fields if field in model.__annotations__]
    also = "[training](#training)" if shared is TrainingSettings else "[method lora](#method-lora)"
    return _section(f"method {name}", model, f"Besides these, those of {also}.", only=own)


def _section(
    title: str, model: type[BaseModel], note: str = "", *, prefix: str = "", only: list[str] | None = None
) -> str:
    first = (model.__doc__ or "").split("\n\n")[0]
    rows = [row for row in _rows(model, prefix) if only is None or row[0].strip("`").partition(".")[0] in only]
    head = ["| name | value | default | what it is |", "| --- | --- | --- | --- |"]
    table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([f"## {title}", " ".join(f"{first} {note}".split()), "", *head, *table, ""])


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, value, default and explanation of each field, those of models inside it after it."""
    said = explanations(model)
    for name, field in model.model_fields.items():
        if name == "method" or (model.__name__, name) in HIDDEN:
            continue
        inner = f"{prefix}{name}[]." if get_origin(field.annotation) is tuple else f"{prefix}{name}."
        yield f"`{prefix}{name}`", _value(field), _default(field), said[name]
        for below in _models(field.annotation):
            yield from _rows(below, inner)


def _value(field: FieldInfo) -> str:
    """What may stand there: `integer ≥ 1`, the words of a choice, `list of text`."""
    bounds = " and ".join(_bounds(field.metadata))
    kind = _kind(field.annotation)
    if not bounds:
        return kind
    if get_origin(field.annotation) is tuple:
        return f"{kind} ({bounds})"
    base, comma, rest = kind.partition(", or none")
    return f"{base} {bounds}{comma}{rest}"


def _bounds(metadata: list[Any]) -> list[str]:
    """Bounds as people write them: `1 to 16`, `> 0`, `at least 2`."""
    least = next((_number(bound.ge) for bound in metadata if isinstance(bound, Ge)), None)
    most = next((_number(bound.le) for bound in metadata if isinstance(bound, Le)), None)
    if least is not None and most is not None:
        return [f"{least} to {most}"]
    signs = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
    found = [
        f"{SIGNS[name]} {_number(getattr(b, name))}"
        for b in metadata
        for kind, name in signs.items()
        if type(b) is kind
    ]
    return found + [f"at least {bound.min_length}" for bound in metadata if isinstance(bound, MinLen)]


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in LINKED:
        return LINKED[annotation]
    if annotation in (Any, JsonValue):
        return "anything"
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        kinds = list(dict.fromkeys(_kind(one) for one in inner if one is not types.NoneType))
        return " or ".join(kinds) + (", or none" if types.NoneType in inner else "")
    if origin in (tuple, list, frozenset):
        if origin is tuple and Ellipsis not in inner:
            return f"{len(inner)} × {_kind(inner[0])}"
        return f"list of {_kind(inner[0])}"
    if origin in (dict, Mapping) or origin is not None and issubclass(origin, Mapping):
        return f"{_kind(inner[0])} → {_kind(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "fields"
    return PLAIN[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined:  # a factory, which the explanation describes
        return ""
    if field.default is None:
        return "none"
    value = to_jsonable_python(field.default)
    if isinstance(field.default, BaseModel):
        return ""
    if isinstance(value, float):
        return f"`{_number(value)}`"
    return f"`{value if isinstance(value, str) and value.isprintable() and value else json.dumps(value)}`"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field holds: by itself, in a list, as one of several, or where it is not none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation is BaseModel or annotation in LINKED else [annotation]
    return [model for one in get_args(annotation) for model in _models(one)]


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
