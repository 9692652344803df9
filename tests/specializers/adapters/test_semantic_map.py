"""The semantic map: clusters of task texts, and the vector c that says which a text resembles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.agents import AdapterError, RecipeError
from metier.specializers.adapters.semantic_map import CENTER_KEY, CENTROIDS_KEY, SemanticMap
from metier.specializers.adapters.text_embedding import (
    DEFAULT_EMBEDDING,
    HashedNgrams,
    find_embedding,
    register_embedding,
)

KINDS = (
    "How many legs do {n} dogs and {m} spiders have in total?",
    "Sort these letters: {n} times b, then {m} times a.",
    "What is {n} plus {m}?",
)
TEXTS = [kind.format(n=n, m=n * 7 % 11) for kind in KINDS for n in range(12)]


def test_the_default_embedding_tells_wordings_apart_more_than_numbers() -> None:
    embed = HashedNgrams()
    assert embed.id == DEFAULT_EMBEDDING == "hashed-ngrams-256/1"
    first, other_numbers, other_words = embed([TEXTS[0], TEXTS[5], TEXTS[20]])
    assert 0.8 < float(first @ other_numbers) < 1.0
    assert float(first @ other_words) < 0.5


def test_the_default_embedding_never_changes() -> None:
    """Adapters on disk depend on it: another embedding needs another id."""
    vector = HashedNgrams()(["Sort the 3 letters: b, a"])[0]
    places = np.argsort(-np.abs(vector), kind="stable")[:4]
    assert [(int(at), round(float(vector[at]), 4)) for at in places] == [
        (34, -0.2857),
        (91, 0.2857),
        (186, -0.2857),
        (24, 0.1429),
    ]


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_text_has_a_vector_of_unit_length_or_none(texts: list[str]) -> None:
    vectors = HashedNgrams()(texts)
    assert vectors.shape == (len(texts), 256) and vectors.dtype == np.float32
    for text, vector in zip(texts, vectors, strict=True):
        length = float(np.linalg.norm(vector))
        assert length == pytest.approx(1.0, abs=1e-5) or length == 0.0
        assert np.array_equal(HashedNgrams()([text])[0], vector)


def test_c_is_the_cosine_to_each_centroid_after_centring() -> None:
    semantic_map = SemanticMap.fit(TEXTS, 3, seed=0)
    embed = HashedNgrams()
    center = np.mean([embed([text])[0] for text in sorted(set(TEXTS))], axis=0)
    np.testing.assert_allclose(semantic_map.center, center, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(semantic_map.centroids, axis=1), 1.0, atol=1e-6)
    for text in TEXTS[::7]:
        moved = embed([text])[0] - center
        expected = [float(moved @ centroid / np.linalg.norm(moved)) for centroid in semantic_map.centroids]
        assert semantic_map.intuition(text) == pytest.approx(expected, abs=2e-6)


def test_kinds_of_task_get_clusters_of_their_own() -> None:
    semantic_map = SemanticMap.fit(TEXTS, 3, seed=0)
    nearest = [int(np.argmax(semantic_map.intuition(text))) for text in TEXTS]
    assert [len(set(nearest[at : at + 12])) for at in (0, 12, 24)] == [1, 1, 1]
    assert len(set(nearest)) == 3
    unseen = semantic_map.intuition("How many legs do 91 dogs and 40 spiders have in total?")
    assert int(np.argmax(unseen)) == nearest[0]
    spread = semantic_map.spread(TEXTS)
    values = np.array([semantic_map.intuition(text) for text in TEXTS])
    assert (spread.clusters_used, spread.clusters) == (3, 3)
    assert (spread.mean, spread.std) == pytest.approx((values.mean(), values.std()), abs=1e-4)
    assert (spread.min, spread.max) == pytest.approx((values.min(), values.max()), abs=1e-4)


def test_the_same_texts_and_seed_give_the_same_map() -> None:
    one, same, other = (
        SemanticMap.fit(texts, 6, seed=s) for texts, s in ((TEXTS, 0), (TEXTS[::-1] * 2, 0), (TEXTS, 1))
    )
    assert np.array_equal(one.centroids, same.centroids) and np.array_equal(one.center, same.center)
    assert not np.array_equal(one.centroids, other.centroids)


def test_fewer_tasks_than_clusters_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"2 distinct tasks.*r1·r2 = 3"):
        SemanticMap.fit(["a task", "another", "another"], 3, seed=0)
    with pytest.raises(RecipeError, match=r"3 distinct tasks.*tells apart as 2"):
        SemanticMap.fit(["A task", "a task", "another"], 3, seed=0)
    assert len(SemanticMap.fit(["a task", "another", "third"], 3, seed=0).centroids) == 3


class Lengths:
    """An embedding of one's own."""

    id = "lengths/1"

    def __call__(self, texts: Sequence[str]) -> Any:
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def write(folder: Path, semantic_map: SemanticMap, **changes: Any) -> Path:
    import torch
    from safetensors.torch import save_file

    dtype = changes.pop("dtype", torch.float32)
    tensors = {name: torch.tensor(value).to(dtype) for name, value in semantic_map.tensors().items()}
    folder.mkdir(exist_ok=True)
    save_file({k: v for k, v in tensors.items() if k != changes.get("without")}, folder / "adapter_model.safetensors")
    block = {"embed_id": semantic_map.embed_id, "prompt_rule": "task-input/1", **changes.get("block", {})}
    (folder / "adapter_config.json").write_text(json.dumps(changes.get("config", {"trex": block})))
    return folder


def test_a_map_is_read_back_from_an_adapter_folder(tmp_path: Path) -> None:
    import torch

    semantic_map = SemanticMap.fit(TEXTS, 6, seed=0)
    loaded = SemanticMap.load(write(tmp_path / "a", semantic_map))
    assert loaded.intuition("What is 5 plus 6?") == semantic_map.intuition("What is 5 plus 6?")
    coarse = SemanticMap.load(write(tmp_path / "b", semantic_map, dtype=torch.bfloat16))
    assert coarse.intuition("What is 5 plus 6?") == pytest.approx(semantic_map.intuition("What is 5 plus 6?"), abs=0.01)


def test_a_map_is_read_without_torch(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", SemanticMap.fit(TEXTS, 6, seed=0))
    code = (
        "import sys; from pathlib import Path; from metier.specializers.adapters.semantic_map import SemanticMap;"
        f"print(len(SemanticMap.load(Path({str(folder)!r})).intuition('a task')));"
        "print('torch' in sys.modules, 'scipy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "False", "False"]


def test_an_embedding_of_ones_own(tmp_path: Path) -> None:
    semantic_map = SemanticMap.fit(TEXTS, 2, embed=Lengths(), seed=0)
    folder = write(tmp_path / "a", semantic_map)
    with pytest.raises(AdapterError, match=r"no embedding 'lengths/1' here.*hashed-ngrams-256/1.*register_embedding"):
        SemanticMap.load(folder)
    assert SemanticMap.load(folder, embed=Lengths()).embed_id == "lengths/1"
    with pytest.raises(AdapterError, match=r"belong to embedding 'lengths/1'.*hashed-ngrams"):
        SemanticMap.load(folder, embed=find_embedding(DEFAULT_EMBEDDING))

    class Renamed(Lengths):
        id = "lengths/registered-here"

    register_embedding(Renamed())
    again = SemanticMap.fit(TEXTS, 2, embed=Renamed(), seed=0)
    assert SemanticMap.load(write(tmp_path / "b", again)).intuition("x") == again.intuition("x")


def test_folders_that_hold_no_map_are_named(tmp_path: Path) -> None:
    semantic_map = SemanticMap.fit(TEXTS, 6, seed=0)
    with pytest.raises(AdapterError, match="lacks adapter_config.json"):
        SemanticMap.load(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="no `trex` block"):
        SemanticMap.load(write(tmp_path / "a", semantic_map, config={"peft_type": "LORA"}))
    with pytest.raises(AdapterError, match=r"rule 'other/9'.*task-input/1"):
        SemanticMap.load(write(tmp_path / "b", semantic_map, block={"prompt_rule": "other/9"}))
    for key in (CENTROIDS_KEY, CENTER_KEY):
        with pytest.raises(AdapterError, match=f"{key} is missing"):
            SemanticMap.load(write(tmp_path / "c", semantic_map, without=key))
    with pytest.raises(AdapterError, match="shape"):
        SemanticMap(semantic_map.centroids, semantic_map.center[:-1])
    bent = SemanticMap(semantic_map.centroids[:, :9], semantic_map.center[:9])
    with pytest.raises(AdapterError, match=r"vectors of length 256.*9"):
        bent.intuition("a task")
    write(tmp_path / "d", SemanticMap(np.full_like(semantic_map.centroids, np.nan), semantic_map.center))
    with pytest.raises(AdapterError, match="not finite"):
        SemanticMap.load(tmp_path / "d")
