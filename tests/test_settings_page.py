"""Every setting is explained at its field, and docs/settings.md says what the code says."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

import metier.router
import metier.runtime.bench
import metier.runtime.settings
import metier.runtime.simulator
import metier.specializers
from metier.agents.frozen_model import FrozenModel, explanations
from metier.runtime import Settings, load_settings

ROOT = Path(__file__).parents[1]
PACKAGES = (
    metier.router,
    metier.runtime.bench,
    metier.runtime.settings,
    metier.runtime.simulator,
    metier.specializers,
)


def script() -> ModuleType:
    """scripts/write_settings_page.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("write_settings_page", ROOT / "scripts" / "write_settings_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_models() -> list[type[BaseModel]]:
    """The session's settings, and every frozen model of the packages that have settings."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return [Settings, *sorted(_below(FrozenModel), key=lambda model: f"{model.__module__}.{model.__name__}")]


def _below(model: type[FrozenModel]) -> Iterator[type[FrozenModel]]:
    for below in model.__subclasses__():
        if below.__module__.startswith("metier."):
            yield below
            yield from _below(below)


def test_the_page_is_what_the_script_writes() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == script().settings_page(), "run: python scripts/write_settings_page.py"


def test_every_setting_is_explained() -> None:
    models = settings_models()
    assert len(models) > 30
    unexplained = {
        f"{model.__name__}.{name}"
        for model in models
        for name in set(model.model_fields) - set(explanations(model)) - {"method"}  # which word chooses a method
    }
    assert not unexplained


def test_a_class_that_repeats_a_field_explains_it_anew_or_keeps_what_was_said() -> None:
    class Parent(FrozenModel):
        """Two fields."""

        steps: int = 1
        """How often."""

        rate: float = 0.1
        """How much,
        over two lines."""

    class Child(Parent):
        """Two other defaults."""

        steps: int = 2
        rate: float = 0.2
        """Less."""

    assert explanations(Parent) == {"steps": "How often.", "rate": "How much, over two lines."}
    assert explanations(Child) == {"steps": "How often.", "rate": "Less."}
    assert explanations(type("Made", (Parent,), {})) == explanations(Parent)


@pytest.mark.parametrize("name", ["engine.kv_cache_mib", "limits.max_tokens", "ray.costs.patience_s", "concurrency"])
def test_names_on_the_page_are_those_that_set_takes(name: str) -> None:
    assert f"\n| `{name}` |" in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    found = load_settings(overrides={name: 7})
    for part in name.split("."):
        found = getattr(found, part)
    assert found == 7
