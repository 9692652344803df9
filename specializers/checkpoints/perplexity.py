"""Perplexity on a text that every Python installation has, so that it can be measured offline and by anyone.

The text is the language reference inside CPython (`pydoc_data.topics`); its name says of which version.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint_files import AddedWeights

__all__ = ["measure_perplexity", "offline_text", "text_windows"]


def offline_text() -> tuple[str, str]:
    """Name and content of the text: all topics of the language reference in alphabetical order."""
    from pydoc_data.topics import topics

    name = f"CPython {sys.version_info.major}.{sys.version_info.minor} language reference (pydoc_data.topics)"
    return name, "\n\n".join(topics[topic] for topic in sorted(topics))


def text_windows(tokenizer: Any, text: str, *, count: int, tokens: int) -> list[list[int]]:
    """Take `count` windows of `tokens` tokens, evenly spread over the text and not overlapping while it lasts."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    last = max(len(ids) - tokens, 0)
    starts = [round(last * number / max(count - 1, 1)) for number in range(count)]
    return [ids[start : start + tokens] for start in starts]


def measure_perplexity(folder: Path, rows: Sequence[Sequence[int]], merged: AddedWeights | None = None) -> float:
    """Perplexity of a checkpoint on token rows: exp of the mean loss over all tokens but the first of each row.

    Runs layer by layer in float32 (see `LayerStream`); `merged` is a LoRA that counts as part of the weights.
    """
    import torch
    from torch.nn import functional

    from .layer_stream import LayerStream

    total = 0.0
    for row, logits in zip(rows, LayerStream(folder, merged).logits(rows), strict=True):
        total += float(functional.cross_entropy(logits[:-1], torch.tensor(list(row[1:])), reduction="sum"))
    return math.exp(total / sum(len(row) - 1 for row in rows))
