"""What transformers opens of a checkpoint: whatever it raises for a damaged file is one error that names the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...agents.errors import BaseModelError

__all__ = ["open_tokenizer", "opened_by_transformers"]


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint; raises BaseModelError when transformers cannot open it."""
    from transformers import AutoTokenizer

    with opened_by_transformers(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder)


@contextmanager
def opened_by_transformers(folder: Path, what: str) -> Iterator[None]:
    """Raise what transformers raises, which is of many kinds, as BaseModelError; `what` it opens is for the error."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        # The first line of some is a heading, and the second says what is wrong.
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise BaseModelError(
            f"transformers cannot open the {what} in {folder}: {reason}",
            expected=f"a {what} that the transformers here knows, whole",
            remedy="Copy or download the model again.",
        ) from error
