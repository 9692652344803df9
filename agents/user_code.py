"""Loads the objects that recipes name in a user's own Python file."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import RecipeError, did_you_mean

__all__ = ["load_named"]


def load_named(folder: Path, named: str, where: str, what: str, fits: Callable[[Any], bool]) -> Any:
    """Load the object that `file.py:name`, relative to `folder`, names; `where` and `what` are for errors.

    Raises: RecipeError when there is no such file, it cannot be imported, or it has no fitting object of that name.
    """
    file, _, name = named.partition(":")
    path = folder / file
    if not path.is_file():
        raise RecipeError(f"{where}: no such file", expected=f"a Python file at {path}")
    spec = importlib.util.spec_from_file_location(f"metier_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(
            f"{where} raised {type(error).__name__}: {error}",
            expected="a file that can be imported",
            remedy="Correct the program, or install what it needs.",
        ) from error
    found = getattr(module, name, None)
    if found is None or not fits(found):
        own = [n for n, v in vars(module).items() if fits(v) and not n.startswith("_") and not inspect.isclass(v)]
        raise RecipeError(
            f"{where}: {file} has no {what} {name!r}",
            expected=f"one of {', '.join(own) or 'none'}",
            remedy=did_you_mean(name, own, "Correct the name."),
        )
    return found
