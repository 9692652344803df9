"""Calibration rows: which of a recipe's rows a training-free method looks at, and the model run over them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..checkpoints.opened_by_transformers import open_tokenizer
from ..training.batches import EncodedRow, encode_rows

if TYPE_CHECKING:
    from .method import Job

__all__ = ["calibration_rows", "hooked", "run_rows", "sample_rows"]

Row = TypeVar("Row")


def sample_rows(rows: Sequence[Row], *, count: int, seed: int) -> list[Row]:
    """Draw at most `count` rows, the same for the same seed, in their own order."""
    chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[number] for number in sorted(chosen)]


class CalibrationSettings(Protocol):
    """Settings of a method that calibrates: how many rows it draws, and the most tokens of one."""

    @property
    def calibration_rows(self) -> int: ...

    @property
    def max_row_tokens(self) -> int: ...


def calibration_rows(settings: CalibrationSettings, job: Job) -> list[EncodedRow]:
    """Draw from the job's rows as `sample_rows` does, and give them as tokens of the job's model.

    Raises: TrainingError for no rows, or a row that was drawn and is longer than `max_row_tokens`.
    """
    drawn = sample_rows(job.rows, count=settings.calibration_rows, seed=job.seed)
    return encode_rows(
        drawn,
        open_tokenizer(job.model),
        max_row_tokens=settings.max_row_tokens,
        template=job.template,
    )


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
