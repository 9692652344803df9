"""Loads objects from a user's own Python file, and tells of its errors by the user's line, not by ours."""

from __future__ import annotations

import importlib.util
import inspect
import linecache
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import RecipeError, did_you_mean
from .text_files import shown

__all__ = ["load_named", "told_at_users_line", "told_with_users_line", "users_line"]

_LINE_CHARACTERS = 200
_MESSAGE_CHARACTERS = 1000


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
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"{where} raised {told_with_users_line(error, folder)}",
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


def told_at_users_line(error: BaseException, folder: Path) -> str:
    """Where a user's own code went wrong, in one line: file, line, the line's text, and the exception.

    The line is the innermost one of a file below `folder`, and for a syntax error the one that cannot be parsed.
    """
    line = users_line(error, folder)
    return f"{line}: {_exception(error)}" if line else _exception(error)


def told_with_users_line(error: BaseException, folder: Path) -> str:
    """As `told_at_users_line`, the exception first: where what was asked for stands before it."""
    line = users_line(error, folder)
    return f"{_exception(error)} at {line}" if line else _exception(error)


def users_line(error: BaseException, folder: Path) -> str:
    """File, line and the line's text of a user's own code below `folder` that raised; empty where none is known."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return _at_line(error.filename, error.lineno, error.text or "")
    home = str(folder.resolve())
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_own(f.filename, home)]
    if not frames:
        return ""
    file, line = frames[-1].filename, frames[-1].lineno or 0
    return _at_line(file, line, linecache.getline(file, line))


def _is_own(file: str, home: str) -> bool:
    return file.startswith(f"{home}/") and "/site-packages/" not in file


def _at_line(file: str, line: int, text: str) -> str:
    text = text.strip()
    return f"{file}, line {line}: {text[:_LINE_CHARACTERS]}" if text else f"{file}, line {line}"


def _exception(error: BaseException) -> str:
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # a user's own exception class may fail here too
        message = shown(error.args)
    message = message if len(message) <= _MESSAGE_CHARACTERS else f"{message[:_MESSAGE_CHARACTERS]}…"
    return f"{type(error).__name__}: {message}"
