"""What the engine serves of every family, base and adapters in one batch, is what transformers and peft compute."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.runtime.engines.served_families import served_differences
from tests.tiny_families import FAMILIES, write_tiny_family

pytestmark = pytest.mark.engine

QUICK = ("gemma3", "phi3", "qwen3_moe")
"""Mixed attention with scaled embeddings, fused layers, experts."""

SERVED = [name for name in FAMILIES if name not in ("gpt2", "opt")]
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.models) for name in SERVED]
)
def test_base_lora_and_trex_in_one_batch(tmp_path: Path, family: str) -> None:
    base = write_tiny_family(tmp_path / "base", family)
    if "experts" in "".join(FAMILIES[family]):
        # vLLM makes its groups for experts with the first engine of a process, if that one has any.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            differences = process.submit(served_differences, base, tmp_path).result()
    else:
        differences = served_differences(base, tmp_path)
    assert all(difference <= TOLERANCE for difference in differences.values()), differences
