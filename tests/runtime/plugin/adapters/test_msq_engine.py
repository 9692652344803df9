"""What MSQ exports, in the real engine: units of 4 and 8 bits side by side give the logits that were trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import anyio
import pytest

from metier.agents import Message, TrafficRow, write_traffic
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.specializers import Recipe, Shelf, produce
from tests.runtime.conftest import TINY
from tests.runtime.plugin.adapters.test_quantised_engine import TOKENS, TOLERANCE, expected_logprobs, served_logprobs
from tests.runtime.processor import skip_without_int4_kernels
from tests.tiny_model import write_tiny_llama

pytestmark = [pytest.mark.anyio, pytest.mark.engine]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_without_int4_kernels()
    place = tmp_path_factory.mktemp("msq")
    base = write_tiny_llama(place / "base", dtype="bfloat16")
    row = TrafficRow(role="solver", messages=(Message(role="user", content="12 plus 7"),), reply="19", score=1.0)
    write_traffic(place / "rows.jsonl", [row])
    method = {"method": "msq", "target_bits": 5.0, "steps": 4, "finish_steps": 1, "on_missed": "drop", "min_bits": 4}
    recipe = Recipe.model_validate(
        {"name": "few-bits", "data": {"traffic": "rows.jsonl"}, "methods": [method], "folder": place}
    )
    shelf = Shelf(place / "shelf")
    variant = produce(recipe, shelf=shelf, base=base)
    assert set(variant.card["served_bits"].values()) == {4, 8}
    return shelf.path(variant) / "weights"


async def test_units_of_different_widths_serve_together(weights: Path) -> None:
    engine = await InProcessEngine.start(weights, TINY, adapters=True, dtype="bfloat16", name="msq")
    try:
        served = await engine._in_thread(partial(served_logprobs, engine, TOKENS))
    finally:
        with anyio.CancelScope(shield=True):
            await engine.close()
    assert (served - expected_logprobs(weights, TOKENS)).abs().max() < TOLERANCE
