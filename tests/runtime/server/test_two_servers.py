"""Two servers on one shelf, each with one slot for three adapters: they neither see nor disturb each other."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from metier.agents import PROMPT_LAYOUT
from metier.runtime import load_settings
from metier.specializers.shelf.base_model import base_fingerprint
from metier.specializers.shelf.shelf import Shelf
from metier.specializers.shelf.variant import AskSpec, EngineSpec
from tests.runtime.served import Served, server
from tests.tiny_model import write_random_lora

pytestmark = pytest.mark.engine

NAMES = ("one", "two", "three")
ASKS = 24


def put_on(shelf: Shelf, staged: Path, base: Path, name: str, seed: int) -> Path:
    """A variant with a random adapter; its folder on the shelf."""
    print_id = base_fingerprint(base)
    write_random_lora(staged / "adapter", base, rank=8, seed=seed)
    record = {
        "base": print_id, "prompt_layout": PROMPT_LAYOUT,
        "engine": EngineSpec(base=print_id).model_dump(), "ask": AskSpec(adapter="lora", rank=8).model_dump(),
    }  # fmt: skip
    return shelf.path(shelf.add(staged, name=name, record=record))


def said(served: Served, variant: str) -> httpx.Response:
    body = {"model": variant, "max_tokens": 12, "messages": [{"role": "user", "content": "Add 12 and 7."}]}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def moves(served: Served, kind: str) -> int:
    """How many adapters a server's engine has loaded or evicted, by its own figures."""
    name = f'metier_engine_adapter_{kind}_total{{engine="base"}} '
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith(name)).removeprefix(name)))


def test_servers_that_change_adapters_all_the_time_answer_alike(tiny_base: Path, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    folders = {name: put_on(shelf, tmp_path / name, tiny_base, name, seed) for seed, name in enumerate(NAMES, start=1)}
    tiny = {
        "eager": True, "dtype": "float32", "kv_cache_mib": 64, "max_model_tokens": 512, "threads": 1, "slot_rank": 8,
        "adapter_slots": 1,
    }  # fmt: skip
    overrides = {f"engine.{name}": value for name, value in tiny.items()} | {"shelf": shelf.folder, "server.drain_s": 1}
    settings = load_settings(overrides=overrides)
    with (
        server(settings=settings, base=tiny_base, variants=NAMES) as first,
        server(settings=settings, base=tiny_base, variants=NAMES) as second,
        ThreadPoolExecutor(8) as clients,
    ):
        alone = {name: text(said(first, name)) for name in NAMES}
        assert len(set(alone.values())) == len(NAMES)
        asked = [(served, name) for served in (first, second) for name in NAMES for _ in range(ASKS // 6)]
        random.Random(5).shuffle(asked)
        answers = list(clients.map(lambda ask: said(*ask), asked))
        assert [text(answer) for answer in answers] == [alone[name] for _, name in asked]
        for served in (first, second):
            assert moves(served, "loads") - moves(served, "evictions") == 1 and moves(served, "loads") >= len(NAMES)

        # One made anew under a name that is served, and one taken away, while both go on.
        put_on(shelf, tmp_path / "again", tiny_base, "one", 99)
        assert [text(said(served, "one")) for served in (first, second)] == [alone["one"]] * 2
        shutil.rmtree(folders["two"])
        for served in (first, second):
            gone = said(served, "two")
            assert gone.status_code in (400, 404, 409, 422) and "is gone from" in gone.json()["error"]["message"]
            assert text(said(served, "three")) == alone["three"]
