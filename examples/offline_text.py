"""Plain text that every Python installation has: the docstrings of its standard library, as rows to tune on.

For recipes that make a variant for no role in particular. Every eighth window is held out. The perplexity on a
variant's card is that of another text, the language reference (`metier.specializers.checkpoints.perplexity`).
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from metier.agents import TrafficRow

# About 250 tokens of SmolLM2: enough context, and a step of a few rows fits into two cores' patience.
ROW_CHARACTERS = 1000
HELD_OUT_EVERY = 8


def rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """`size` windows of text, drawn without overlap; a row without messages is learned from its first word on."""
    windows = [text for number, text in enumerate(_windows()) if number % HELD_OUT_EVERY]
    if size > len(windows):
        raise ValueError(f"the text has {len(windows)} windows to tune on; size is {size}")
    for number in sorted(random.Random(seed).sample(range(len(windows)), size)):
        yield TrafficRow(role="text", messages=(), reply=windows[number])


def held_out() -> list[str]:
    """The windows that `rows` never gives."""
    return _windows()[::HELD_OUT_EVERY]


def _windows() -> list[str]:
    text = "\n\n".join(docstrings())
    return [text[start : start + ROW_CHARACTERS] for start in range(0, len(text) - ROW_CHARACTERS, ROW_CHARACTERS)]


def docstrings() -> Iterator[str]:
    """Docstrings of the modules, classes and functions of the standard library's own files, in order of their names."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found = ast.get_docstring(node)
                if found and len(found) > 80:
                    yield found
