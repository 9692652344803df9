"""Whether a checkpoint's output head is its embedding: by what is stored, since configs say so wrongly.

A config with `tie_word_embeddings: true` beside a stored head that differs is what training the head of a tied model
leaves. Loaders of transformers then use the stored head.
"""

from __future__ import annotations

from pathlib import Path

from .tensor_files import TensorInfo, weight_files

__all__ = ["HEAD", "is_embedding", "stores_own_head"]

HEAD = "lm_head.weight"
"""Name of the output head's weight."""

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# A head that was trained differs nearly everywhere; reading all of it would take seconds at each start.
_SAMPLES = 64
_SAMPLE_BYTES = 1024


def stores_own_head(folder: Path) -> bool:
    """Whether a checkpoint stores an output head, and it is no copy of the embedding.

    Raises: BaseModelError as `weight_files`.
    """
    stored = {name: (path, info) for path, part in weight_files(folder).items() for name, info in part.items()}
    if HEAD not in stored:
        return False
    embedding = next((name for name in stored if is_embedding(name)), None)
    return embedding is None or not _alike(stored[HEAD], stored[embedding])


def is_embedding(name: str) -> bool:
    """Whether a tensor of this name is the embedding of tokens."""
    return name.endswith(_EMBEDDINGS)


def _alike(one: tuple[Path, TensorInfo], other: tuple[Path, TensorInfo]) -> bool:
    (path, info), (other_path, other_info) = one, other
    if (info.dtype, info.shape) != (other_info.dtype, other_info.shape):
        return False
    size = info.end - info.start
    last = max(size - _SAMPLE_BYTES, 0)
    with path.open("rb") as file, other_path.open("rb") as other_file:
        for number in range(_SAMPLES):
            at = last * number // (_SAMPLES - 1)
            file.seek(info.start + at)
            other_file.seek(other_info.start + at)
            count = min(_SAMPLE_BYTES, size - at)
            if file.read(count) != other_file.read(count):
                return False
    return True
