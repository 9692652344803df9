"""An adapter whose values overflow harms no ask but its own, which ends in an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.agents import Ask
from metier.agents.errors import AdapterError, NotFiniteError
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.engines.running_engine import RunningEngine
from metier.runtime.engines.supervised.supervised_engine import SupervisedEngine
from metier.runtime.engines.variant_targets import EngineStart, VariantTarget
from metier.runtime.plugin.finite_values import clear_blocks, rows_not_finite
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.slots.adapter import LoadedAdapter
from metier.runtime.slots.announced_uses import AnnouncedUses
from metier.specializers import Variant
from metier.specializers.adapters.semantic_map import SemanticMap
from tests.tiny_model import write_random_lora
from tests.tiny_trex import TASKS, write_random_trex

pytestmark = [pytest.mark.engine, pytest.mark.anyio]
# A small cache, so that every block is soon another ask's.
SETTINGS = EngineSettings(
    eager=True, kv_cache_mib=1, max_model_tokens=256, threads=1, adapter_slots=4, slot_rank=64, max_running=8
)
ROUNDS, POISONED, TEXTS = 6, 4, 4


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def overflowing(folder: Path) -> Path:
    """The adapter in `folder` with finite weights whose products are not: each fits its dtype, their sums do not."""
    path = folder / "adapter_model.safetensors"
    huge = {name: torch.full_like(t, 3e38) if "lora_B" in name else t for name, t in load_file(path).items()}
    save_file(huge, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedAdapter]:
    root = tmp_path_factory.mktemp("finite")
    folders = {
        "lora": write_random_lora(root / "lora", tiny_base, rank=8, seed=1),
        "trex": write_random_trex(root / "trex", tiny_base, r1=2, r2=4, seed=2),
        "bad lora": overflowing(write_random_lora(root / "bad-lora", tiny_base, rank=8, seed=3)),
        "bad trex": overflowing(write_random_trex(root / "bad-trex", tiny_base, r1=2, r2=4, seed=4)),
    }
    return {name: LoadedAdapter(number, name, path) for number, (name, path) in enumerate(folders.items(), start=1)}


@pytest.fixture(scope="module")
def engine(tiny_base: Path, adapters: dict[str, LoadedAdapter]) -> Iterator[InProcessEngine]:
    started = anyio.run(partial(InProcessEngine.start, tiny_base, SETTINGS, adapters=True, name="finite"))
    for adapter in adapters.values():
        anyio.run(started.add_adapter, adapter)
    yield started
    anyio.run(started.close)


def request(ask: Ask, adapter: LoadedAdapter | None) -> EngineRequest:
    trex = adapter is not None and "trex" in adapter.id
    return EngineRequest(ask, adapter, SemanticMap.load(adapter.path).intuition(TASKS[0]) if trex else None)


@pytest.mark.parametrize("bad", ["bad lora", "bad trex"])
async def test_neighbours_of_a_poisoned_adapter_are_answered_as_before(
    engine: InProcessEngine, adapters: dict[str, LoadedAdapter], make_ask: Callable[..., Ask], bad: str
) -> None:
    innocent = [
        request(make_ask(f"Number {text} please. " * (text + 1)), adapter)
        for text in range(TEXTS)
        for adapter in (None, adapters["lora"], adapters["trex"])
    ]
    before = [(await engine.generate(one)).text for one in innocent]
    assert all(before)
    errors: list[NotFiniteError] = []

    async def poison(text: str) -> None:
        with pytest.raises(NotFiniteError) as caught:
            await engine.generate(request(make_ask(text), adapters[bad]))
        errors.append(caught.value)

    for number in range(ROUNDS):
        replies: dict[int, str] = {}

        async def ask(at: int, replies: dict[int, str] = replies) -> None:
            replies[at] = (await engine.generate(innocent[at])).text

        async with anyio.create_task_group() as group:  # beside them in one batch
            for copy in range(POISONED):
                group.start_soon(poison, f"Poison {number} {copy}. " * 12)
            for at in range(len(innocent)):
                group.start_soon(ask, at)
        assert [replies[at] for at in range(len(innocent))] == before
        assert [(await engine.generate(one)).text for one in innocent] == before  # and after them, in their blocks
    assert len(errors) == ROUNDS * POISONED
    assert f"what adapter {bad!r} computes" in str(errors[0])


async def test_an_adapter_that_was_not_finite_is_not_asked_again(
    tiny_base: Path,
    adapters: dict[str, LoadedAdapter],
    make_ask: Callable[..., Ask],
    tiny_variants: dict[str, tuple[Variant, Path]],
) -> None:
    engine = await SupervisedEngine.start(tiny_base, SETTINGS, adapters=True, name="finite")  # errors cross processes
    try:
        running = RunningEngine(engine, SETTINGS, AnnouncedUses())
        sound = tiny_variants["lora0"][0]
        broken = sound.model_copy(update={"id": "f" * 16, "name": "broken"})
        start = EngineStart("finite", tiny_base, "auto", True, SETTINGS)
        target = VariantTarget(start, broken, adapters["bad lora"].path)
        with pytest.raises(NotFiniteError, match=f"what adapter '{broken.id}' computes .* is not finite"):
            await running.ask(target, make_ask("Say it."))
        with pytest.raises(AdapterError, match="variant 'broken' is not asked any more: what adapter .* not finite"):
            await running.ask(target, make_ask("Say it again."))
        assert engine.counters().adapter_loads == 1
        assert (await running.ask(VariantTarget(start, sound, adapters["lora"].path), make_ask("Say it."))).text
        assert (await running.ask(VariantTarget(start), make_ask("Say it."))).text
    finally:
        await engine.close()


def test_only_the_blocks_named_are_cleared() -> None:
    caches = [torch.full((4, 2, 3), float("nan")) for _ in range(2)]
    clear_blocks([*caches, caches[0]], [1, 3])
    for cache in caches:
        assert [bool(torch.isnan(block).any()) for block in cache] == [True, False, True, False]
        assert bool((cache[1] == 0).all())


def test_forbidden_words_are_no_fault() -> None:
    lowest, highest, nan = float("-inf"), float("inf"), float("nan")
    rows = torch.tensor([[0.0, 1.0], [lowest, 2.0], [nan, 1.0], [1.0, highest]])
    assert rows_not_finite(rows).tolist() == [False, False, True, True]
