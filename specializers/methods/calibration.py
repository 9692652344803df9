"""Calibration rows: which of a recipe's rows a training-free method looks at, and the model run over them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ...agents.traffic import TrafficRow
from ..training.batches import EncodedRow, encode_rows

__all__ = ["calibration_rows", "hooked", "run_rows", "sample_rows"]

Row = TypeVar("Row")


def sample_rows(rows: Sequence[Row], *, count: int, seed: int) -> list[Row]:
    """Draw at most `count` rows, the same for the same seed, in their own order."""
    chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[number] for number in sorted(chosen)]


def calibration_rows(
    rows: Sequence[TrafficRow], tokenizer: Any, *, count: int, seed: int, max_row_tokens: int
) -> list[EncodedRow]:
    """Draw rows as `sample_rows` does, and give them as token ids.

    Raises: TrainingError for no rows, or a row that was drawn and is longer than `max_row_tokens`.
    """
    return encode_rows(sample_rows(rows, count=count, seed=seed), tokenizer, max_row_tokens=max_row_tokens)


def run_rows(model: Any, rows: Sequence[EncodedRow]) -> None:
    """Run the model over each row by itself, so that nothing is padded; what is measured is measured by hooks."""
    import torch

    model.eval()
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.tokens]), use_cache=False, logits_to_keep=1)


@contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
