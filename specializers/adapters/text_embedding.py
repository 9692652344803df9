"""Text as vectors of fixed length: what the semantic map clusters. The default needs no model and no download."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ...agents.errors import AdapterError
from ...agents.text_files import shown

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

__all__ = ["DEFAULT_EMBEDDING", "HashedNgrams", "TextEmbedding", "find_embedding", "register_embedding"]


class TextEmbedding(Protocol):
    """Anything that turns texts into float32 vectors [texts, e]; `id` names the function and its version."""

    @property
    def id(self) -> str: ...

    def __call__(self, texts: Sequence[str]) -> NDArray[numpy.float32]: ...


@dataclass(frozen=True)
class HashedNgrams:
    """Signed feature hashing of words, pairs of words, and runs of 3 to 5 letters within words.

    Source: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", eq. 1-2: each feature adds its
    sign to one of `size` places, so that collisions cancel on average. Letters are lowered, and within words and pairs
    every number is the same sign, so texts are near when they are worded alike; each number is a feature of its own
    besides, so texts that differ in numbers only differ a little. A feature that occurs n times counts sqrt(n);
    vectors have unit length, except that of a text with no features, which is zero.
    """

    size: int = 256

    @property
    def id(self) -> str:
        return f"hashed-ngrams-{self.size}/1"

    def __call__(self, texts: Sequence[str]) -> NDArray[numpy.float32]:
        import numpy

        vectors = numpy.zeros((len(texts), self.size), dtype=numpy.float32)
        for row, text in enumerate(texts):
            counts = Counter(_features(text))
            if not counts:
                continue
            # crc32 is stable over versions and machines, but its bits are not independent: multiply to mix them.
            hashes = numpy.fromiter((zlib.crc32(f.encode()) for f in counts), dtype=numpy.uint64, count=len(counts))
            mixed = (hashes + numpy.uint64(1)) * numpy.uint64(0x9E3779B97F4A7C15)
            places = (mixed >> numpy.uint64(40)) % numpy.uint64(self.size)
            signs = 1.0 - 2.0 * ((mixed >> numpy.uint64(39)) & numpy.uint64(1)).astype(numpy.float64)
            weights = signs * numpy.sqrt(numpy.fromiter(counts.values(), dtype=numpy.float64, count=len(counts)))
            vector = numpy.bincount(places.astype(numpy.int64), weights=weights, minlength=self.size)
            length = float(numpy.linalg.norm(vector))
            if length > 0.0:
                vectors[row] = (vector / length).astype(numpy.float32)
        return vectors


DEFAULT_EMBEDDING = HashedNgrams().id
_EMBEDDINGS: dict[str, TextEmbedding] = {DEFAULT_EMBEDDING: HashedNgrams()}


def register_embedding(embedding: TextEmbedding) -> None:
    """Make an embedding of your own known by its id, for recipes, and for adapters trained with it."""
    _EMBEDDINGS[embedding.id] = embedding


def find_embedding(embed_id: str) -> TextEmbedding:
    """The embedding of that id; raises AdapterError that lists those known here."""
    if embed_id not in _EMBEDDINGS:
        raise AdapterError(
            f"there is no embedding {shown(embed_id)} here",
            expected=f"one of {', '.join(sorted(_EMBEDDINGS))}",
            remedy="Register it with register_embedding before the adapter is used, or correct embed_id.",
        )
    return _EMBEDDINGS[embed_id]


_NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")
_WORDS = re.compile(r"0|[^\W\d_]+|[^\w\s]")


def _features(text: str) -> Iterator[str]:
    lowered = text.lower()
    for number in _NUMBERS.findall(lowered):
        yield "=" + number
    words = _WORDS.findall(_NUMBERS.sub("0", lowered))
    yield from words
    for first, second in zip(words, words[1:], strict=False):
        yield f"{first} {second}"
    for word in words:
        if len(word) > 1:
            edged = f"<{word}>"
            for length in (3, 4, 5):
                for start in range(len(edged) - length + 1):
                    yield "#" + edged[start : start + length]
