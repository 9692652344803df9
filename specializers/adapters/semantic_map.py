"""Which kind of task a text is: its likeness to clusters of training texts, the "intuition" of T-REX.

Source: T-REX (arXiv 2404.08985) and its released code, where c = C·embed(text). How C is made is not released:
k-means over the embeddings of the training texts is our reading of its "semantic clustering". Embeddings are
centred on their mean before they are normalised, because sentence embeddings all point one way, which would make
all of c alike; centroids have unit length, so that c is a vector of cosines.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.errors import AdapterError, RecipeError
from ...agents.prompts import TASK_TEXT_RULE
from ..checkpoints.tensor_files import CorruptFileError, read_header
from .adapter_files import CONFIG, WEIGHTS, read_config
from .text_embedding import DEFAULT_EMBEDDING, TextEmbedding, find_embedding

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

__all__ = ["CENTER_KEY", "CENTROIDS_KEY", "IntuitionSpread", "SemanticMap"]

CENTROIDS_KEY = "trex_centroids"
CENTER_KEY = "trex_center"

_KMEANS_ROUNDS = 30
_KMEANS_TRIES = 4
_REMEMBERED_TEXTS = 4096
# c is the same bits however it was computed: products over many texts and over one differ in the last digits.
_DECIMALS = 6


@dataclass(frozen=True)
class IntuitionSpread:
    """How c spreads over texts: near-constant values would give the gate no information.

    `clusters_used` counts those that are the nearest of some text; mean, std, min and max are over all values.
    """

    mean: float
    std: float
    min: float
    max: float
    clusters_used: int
    clusters: int


@dataclass(frozen=True, eq=False)
class SemanticMap:
    """Clusters of texts: `centroids` [k, e] of unit length, `center` [e], and the embedding they belong to.

    `embed` is looked up by `embed_id` when it is not given. Raises AdapterError when the shapes do not fit, or the
    embedding is another's or not known here.
    """

    centroids: NDArray[numpy.float32]
    center: NDArray[numpy.float32]
    embed_id: str = DEFAULT_EMBEDDING
    embed: TextEmbedding | None = None
    _known: dict[str, tuple[float, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.embed is None:
            object.__setattr__(self, "embed", find_embedding(self.embed_id))
        elif self.embed.id != self.embed_id:
            raise AdapterError(
                f"the centroids belong to embedding {self.embed_id!r}",
                expected=f"those of the embedding given, {self.embed.id!r}",
                remedy="Use the adapter with the embedding it was trained with.",
            )
        if self.centroids.ndim != 2 or self.center.shape != self.centroids.shape[1:]:
            raise AdapterError(
                f"centroids have shape {list(self.centroids.shape)} and their center {list(self.center.shape)}",
                expected="[k, e] and [e]",
                remedy="Copy the adapter again, or make it again from its recipe.",
            )

    def intuition(self, text: str) -> tuple[float, ...]:
        """c of a text: its cosine to each cluster, k values from -1 to 1."""
        if text not in self._known:
            if len(self._known) >= _REMEMBERED_TEXTS:
                self._known.clear()
            cosines = self._directions([text])[0] @ self.centroids.T
            self._known[text] = tuple(round(float(cosine), _DECIMALS) for cosine in cosines)
        return self._known[text]

    def spread(self, texts: Sequence[str]) -> IntuitionSpread:
        """How c spreads over these texts."""
        import numpy

        c = numpy.array([self.intuition(text) for text in texts])
        return IntuitionSpread(
            mean=round(float(c.mean()), 4),
            std=round(float(c.std()), 4),
            min=round(float(c.min()), 4),
            max=round(float(c.max()), 4),
            clusters_used=len(set(c.argmax(axis=1).tolist())),
            clusters=len(self.centroids),
        )

    def tensors(self) -> dict[str, NDArray[numpy.float32]]:
        """Centroids and center under the names they have in an adapter's file."""
        return {CENTROIDS_KEY: self.centroids, CENTER_KEY: self.center}

    @classmethod
    def fit(cls, texts: Sequence[str], k: int, *, embed: TextEmbedding | None = None, seed: int) -> SemanticMap:
        """Cluster the distinct ones of `texts` into `k`; the same texts and seed give the same map.

        k-means runs from several seeded starts, and the one with the least inertia is kept.
        Raises: RecipeError when there are fewer distinct texts than clusters.
        """
        import numpy

        embed = embed if embed is not None else find_embedding(DEFAULT_EMBEDDING)
        distinct = sorted(set(texts))
        vectors = embed(distinct)
        different = len(numpy.unique(vectors, axis=0))
        if different < k:
            raise RecipeError(
                f"the training data has {len(distinct)} distinct tasks, which embedding {embed.id!r} tells apart as "
                f"{different}",
                expected=f"at least as many as clusters, r1·r2 = {k}",
                remedy="Train on more tasks, or set smaller r1 and r2.",
            )
        center = vectors.mean(axis=0).astype(numpy.float32)
        directions = _normalised(vectors - center).astype(numpy.float64)
        found = _k_means(directions, k, seed)
        return cls(_normalised(found).astype(numpy.float32), center, embed.id, embed)

    @classmethod
    def load(cls, adapter_folder: Path, embed: TextEmbedding | None = None) -> SemanticMap:
        """Read the map of a T-REX adapter folder; needs no torch.

        Raises: AdapterError when the folder holds none, or one for another embedding or rule of task text.
        """
        block = read_config(adapter_folder).get("trex")
        if not isinstance(block, dict):
            raise AdapterError(
                f"{adapter_folder / CONFIG} has no `trex` block",
                expected="the settings of a T-REX adapter",
                remedy="Use a T-REX adapter, or copy it again, whole.",
            )
        if block.get("prompt_rule") != TASK_TEXT_RULE:
            raise AdapterError(
                f"adapter {adapter_folder} was trained with task texts by rule {block.get('prompt_rule')!r}",
                expected=f"rule {TASK_TEXT_RULE!r}",
                remedy="Make it again from its recipe: its clusters are of other texts.",
            )
        path = adapter_folder / WEIGHTS
        return cls(_read_floats(path, CENTROIDS_KEY), _read_floats(path, CENTER_KEY), str(block.get("embed_id")), embed)

    def _directions(self, texts: Sequence[str]) -> NDArray[numpy.float32]:
        assert self.embed is not None
        vectors = self.embed(texts)
        if vectors.shape[1:] != self.center.shape:
            raise AdapterError(
                f"embedding {self.embed_id!r} gives vectors of length {vectors.shape[1]}",
                expected=f"{len(self.center)}, the length of the adapter's centroids",
                remedy="Use the adapter with the embedding it was trained with.",
            )
        return _normalised(vectors - self.center)


def _k_means(points: NDArray[numpy.float64], k: int, seed: int) -> NDArray[numpy.float64]:
    """Centroids [k, e] of points [n, e]: the best of a few seeded starts, by the sum of squared distances."""
    import numpy
    from scipy.cluster.vq import kmeans2, vq

    generator = numpy.random.default_rng(seed)
    best, least = points[:k], math.inf
    for _ in range(_KMEANS_TRIES):
        with warnings.catch_warnings():
            # A cluster that lost its last point stays where it was: still a direction, and the spread reports it.
            warnings.filterwarnings("ignore", message="One of the clusters is empty")
            found, _labels = kmeans2(points, k, iter=_KMEANS_ROUNDS, minit="++", rng=generator)
        inertia = float((vq(points, found)[1] ** 2).sum())
        if inertia < least:
            best, least = found, inertia
    return best


def _normalised(vectors: NDArray[Any]) -> NDArray[Any]:
    """Rows at unit length; a zero row stays zero."""
    import numpy

    lengths = numpy.linalg.norm(vectors, axis=-1, keepdims=True)
    result: NDArray[Any] = vectors / numpy.where(lengths > 0.0, lengths, 1.0)
    return result


def _read_floats(path: Path, key: str) -> NDArray[numpy.float32]:
    import numpy

    remedy = "Copy the adapter again, or make it again from its recipe."
    try:
        info = read_header(path).get(key)
        kind = None if info is None else {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(info.dtype)
        if info is None or kind is None:
            raise AdapterError(f"{path}: {key} is missing or no floating-point tensor", expected=key, remedy=remedy)
        raw = numpy.fromfile(path, dtype=kind, count=math.prod(info.shape), offset=info.start).reshape(info.shape)
    except (CorruptFileError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}", expected="a whole file", remedy=remedy) from error
    if info.dtype == "BF16":  # the upper half of a float32
        raw = (raw.astype("<u4") << 16).view("<f4")
    values: NDArray[numpy.float32] = raw.astype(numpy.float32)
    if not numpy.isfinite(values).all():
        raise AdapterError(f"{path}: {key} holds values that are not finite", expected="finite numbers", remedy=remedy)
    return values
