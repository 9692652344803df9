"""Checkpoints of other tools, of families with fused layers, and with heads of their own, in the real engine."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.agents import EngineError
from metier.runtime.engines.answer_check import check_answers
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.plugin import exact_int8
from metier.runtime.slots.adapter import LoadedAdapter
from metier.specializers import Recipe, Shelf, produce
from metier.specializers.checkpoints.self_check import read_self_check
from tests.quantised_elsewhere import KINDS, write_quantised
from tests.runtime.conftest import TINY
from tests.runtime.plugin.adapters.test_quantised_engine import TOKENS, expected_logprobs, served_logprobs
from tests.runtime.processor import skip_without_int4_kernels, skip_without_int8_kernels
from tests.tiny_families import write_tiny_family
from tests.tiny_model import write_random_lora

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

NO_KERNEL = ("fp8-tensor", "fp8")
SERVED = [kind for kind in KINDS if kind not in NO_KERNEL]
NUMBERS = itertools.count(1000)


@pytest.fixture
def anyio_backend() -> str:
    """One event loop: what is tested is below it, and each engine takes seconds to start."""
    return "asyncio"


# Nats; bfloat16 sums in another order, and FP8 rounds the inputs too, to three bits of fraction. Layers that are read
# wrongly come to six.
TOLERANCE = 0.4


@asynccontextmanager
async def running(weights: Path, dtype: str = "bfloat16", *, adapters: bool = False) -> AsyncIterator[InProcessEngine]:
    engine = await InProcessEngine.start(weights, TINY, adapters=adapters, dtype=dtype, name="other")
    try:
        yield engine
    finally:
        await engine.close()


async def difference(engine: InProcessEngine, weights: Path, adapter: LoadedAdapter | None = None) -> float:
    served = await engine._in_thread(lambda: served_logprobs(engine, TOKENS, adapter))
    expected = expected_logprobs(weights, TOKENS, None if adapter is None else adapter.path)
    return float((served - expected).abs().max())


@pytest.mark.parametrize("kind", SERVED)
async def test_checkpoints_of_other_tools_serve_what_is_trained_on(tmp_path: Path, kind: str) -> None:
    if kind in ("gptq", "awq") or kind.startswith("int4"):
        skip_without_int4_kernels()
    if kind.startswith("int8"):
        skip_without_int8_kernels()
    base = write_tiny_family(tmp_path / "base", "qwen3", dtype="bfloat16", num_hidden_layers=2)
    write_quantised(base, tmp_path / "q", kind)
    folder = write_random_lora(tmp_path / "lora", base, rank=4, dtype="bfloat16")
    adapter = LoadedAdapter(number=next(NUMBERS), id=f"lora-{kind}", path=folder)
    async with running(tmp_path / "q", adapters=True) as engine:
        plain = await difference(engine, tmp_path / "q")
        await engine.add_adapter(adapter)
        adapted = await difference(engine, tmp_path / "q", adapter)
        assert max(plain, adapted) < TOLERANCE


@pytest.mark.parametrize(("family", "scheme"), [("phi3", "w8a8"), ("phi3", "w4a16"), ("gemma3", "w8a8")])
async def test_a_family_quantised_by_us(tmp_path: Path, family: str, scheme: str) -> None:
    (skip_without_int8_kernels if scheme == "w8a8" else skip_without_int4_kernels)()
    base = write_tiny_family(tmp_path / "base", family, dtype="bfloat16")
    method = {"method": "ptq", "scheme": scheme, "group_size": 32, "perplexity_windows": 0}
    shelf = Shelf(tmp_path / "shelf")
    variant = produce(Recipe.model_validate({"name": "few", "methods": [method]}), shelf=shelf, base=base)
    weights = shelf.path(variant) / "weights"
    async with running(weights) as engine:
        await check_answers(engine, read_self_check(variant.card))
        found = await difference(engine, weights)
        assert found < TOLERANCE


def with_head(base: Path, target: Path) -> Path:
    shutil.copytree(base, target)
    tensors = load_file(target / "model.safetensors")
    noise = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(7))
    save_file({**tensors, "lm_head.weight": noise * 0.15}, target / "model.safetensors", metadata={"format": "pt"})
    return target


async def test_a_head_of_its_own_is_served(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    weights = with_head(tiny_family("qwen3"), tmp_path / "qwen3")
    async with running(weights, "float32") as engine:
        assert await difference(engine, weights) < TOLERANCE


async def test_a_head_that_the_engine_has_no_place_for_is_refused(
    tmp_path: Path, tiny_family: Callable[[str], Path]
) -> None:
    weights = with_head(tiny_family("gemma2"), tmp_path / "gemma2")
    with pytest.raises(EngineError, match=r"an output head that is not its embedding.*no other for gemma2"):
        async with running(weights, "float32"):
            pass


@pytest.mark.parametrize("kind", NO_KERNEL)
async def test_float8_with_one_scale_for_a_matrix_is_refused_at_start(
    tmp_path: Path, tiny_family: Callable[[str], Path], kind: str
) -> None:
    write_quantised(tiny_family("qwen3"), tmp_path / kind, kind)
    with pytest.raises(EngineError, match=r"float8 with one scale for a whole matrix.*each channel"):
        async with running(tmp_path / kind):
            pass


async def test_four_bits_in_float32_are_refused_at_start(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    for kind in ("int4-group", "gptq", "awq"):
        write_quantised(tiny_family("qwen3"), tmp_path / kind, kind)
        with pytest.raises(EngineError, match=r"have 4 bits.*float32.*Set dtype: bfloat16"):
            async with running(tmp_path / kind, "float32"):
                pass


async def test_without_vnni_int8_layers_are_computed_dense(
    tmp_path: Path, tiny_family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = exact_int8.CPUInt8ScaledMMLinearKernel
    for name in ("process_weights_after_loading", "apply_weights"):
        monkeypatch.setattr(kernel, name, getattr(kernel, name))  # put back at the end
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert not exact_int8.multiplies_int8()
    assert "no VNNI" in exact_int8.install()
    for kind in ("int8-channel", "int8-tensor"):
        write_quantised(tiny_family("qwen3"), tmp_path / kind, kind)
        async with running(tmp_path / kind, "float32", adapters=True) as engine:
            found = await difference(engine, tmp_path / kind)
            assert found < 0.3  # inputs are not rounded here
