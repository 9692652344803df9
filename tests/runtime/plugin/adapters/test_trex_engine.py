"""T-REX adapters in both forms of the engine: what is served, what is cached, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.agents.errors import AdapterError, AskRejectedError, EngineError
from metier.agents.messages import Ask
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.engines.supervised.supervised_engine import SupervisedEngine
from metier.runtime.engines.trex_asks import TrexAdapters, cache_salt
from metier.runtime.plugin import wire
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.slots.adapter import LoadedAdapter
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.adapters.trex_shape import TREX, TREX_FORMAT, TrexShape, read_trex_shape
from tests.tiny_model import write_random_lora
from tests.tiny_trex import TASKS, write_random_trex

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # nothing here depends on the loop, and the cache would remember the first round


SETTINGS = EngineSettings(
    eager=True, kv_cache_mib=64, max_model_tokens=512, threads=1, adapter_slots=2, slot_rank=64, max_running=8
)
MakeAsk = Callable[..., Ask]


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedAdapter]:
    root = tmp_path_factory.mktemp("trex-engine")
    folders = {
        "wide": write_random_trex(root / "wide", tiny_base, r1=4, r2=8, seed=1),
        "narrow": write_random_trex(root / "narrow", tiny_base, r1=2, r2=4, targets=("q_proj", "v_proj"), seed=2),
        "lora": write_random_lora(root / "lora", tiny_base, rank=16, seed=3),
    }
    return {name: LoadedAdapter(number, name, path) for number, (name, path) in enumerate(folders.items(), start=1)}


@pytest.fixture(scope="module")
def engine(tiny_base: Path, adapters: dict[str, LoadedAdapter]) -> Iterator[InProcessEngine]:
    started = anyio.run(partial(InProcessEngine.start, tiny_base, SETTINGS, adapters=True, name="trex"))
    anyio.run(started.add_adapter, adapters["wide"])
    yield started
    anyio.run(started.close)


def intuition(adapter: LoadedAdapter, task: int) -> tuple[float, ...]:
    return SemanticMap.load(adapter.path).intuition(TASKS[task])


async def test_blocks_are_shared_by_the_same_vector_only(
    engine: InProcessEngine, adapters: dict[str, LoadedAdapter], make_ask: MakeAsk
) -> None:
    wide, ask = adapters["wide"], make_ask("State the final answer as one integer. " * 8, max_tokens=16)
    replies = [await engine.generate(EngineRequest(ask, wide, intuition(wide, task))) for task in (0, 2, 0, 2)] + [
        await engine.generate(EngineRequest(ask))
    ]
    assert [bool(reply.usage.cached_tokens) for reply in replies] == [False, False, True, True, False]
    assert replies[0].text == replies[2].text and replies[1].text == replies[3].text
    assert len({reply.text for reply in replies}) == 3
    assert replies[0].variant == "wide"


@pytest.mark.parametrize(
    ("adapter", "c", "says"),
    [
        ("wide", None, "a T-REX adapter, but no semantic vector; expected 32 finite numbers"),
        ("wide", (0.1,) * 8, "a semantic vector of 8 numbers; expected 32 finite numbers"),
        ("wide", (0.1,) * 31 + (float("nan"),), "a semantic vector with numbers that are not finite"),
        (None, (0.1,) * 32, "a semantic vector, but no T-REX adapter"),
    ],
)
async def test_a_vector_that_does_not_fit_is_refused_for_that_ask_only(
    engine: InProcessEngine,
    adapters: dict[str, LoadedAdapter],
    make_ask: MakeAsk,
    adapter: str | None,
    c: tuple[float, ...] | None,
    says: str,
) -> None:
    with pytest.raises(AskRejectedError, match=f"role 'solver' at step 'solve' has {says}"):
        await engine.generate(EngineRequest(make_ask(), adapters[adapter] if adapter else None, c))
    wide = adapters["wide"]
    assert (await engine.generate(EngineRequest(make_ask(), wide, intuition(wide, 0)))).text


async def test_a_vector_that_got_lost_on_the_way_fails_its_own_ask(
    engine: InProcessEngine, adapters: dict[str, LoadedAdapter], make_ask: MakeAsk, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, told = adapters["wide"], []

    async def good() -> None:
        told.append(await engine.generate(EngineRequest(make_ask(max_tokens=8))))

    async def bad() -> None:
        with pytest.raises(EngineError, match="role 'lost'.*needs 32 numbers as metier_intuition"):
            await engine.generate(EngineRequest(make_ask("Add 2 and 2.", role="lost"), wide))
        told.append(None)

    monkeypatch.setattr(TrexAdapters, "check", lambda self, request: None)
    async with anyio.create_task_group() as group:
        group.start_soon(good)
        group.start_soon(bad)
    assert len(told) == 2


async def test_a_slot_keeps_nothing_of_who_was_there_before(
    engine: InProcessEngine, adapters: dict[str, LoadedAdapter], make_ask: MakeAsk
) -> None:
    """Two slots; each adapter comes in where another kind has left, and answers as it did."""
    ask, texts = make_ask("Sort these words.", max_tokens=16), {}

    async def answer(name: str) -> str:
        c = None if name == "lora" else intuition(adapters[name], 1)
        return (await engine.generate(EngineRequest(ask, adapters[name], c))).text

    texts["wide"] = await answer("wide")
    for leaving, coming in (
        ("wide", "lora"),
        (None, "narrow"),
        ("lora", "wide"),
        ("narrow", "lora"),
        ("wide", "narrow"),
    ):
        if leaving:
            await engine.remove_adapter(adapters[leaving])
        await engine.add_adapter(adapters[coming])
        assert await answer(coming) == texts.setdefault(coming, await answer(coming))
    assert len(set(texts.values())) == 3
    await engine.remove_adapter(adapters["lora"])
    await engine.remove_adapter(adapters["narrow"])
    await engine.add_adapter(adapters["wide"])
    assert await answer("wide") == texts["wide"]


def broken(adapter: LoadedAdapter, folder: Path, number: int, change: Callable[[dict[str, torch.Tensor]], None]) -> Any:
    """A copy of an adapter with its tensors changed."""
    shutil.copytree(adapter.path, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return LoadedAdapter(number, folder.name, folder)


ROUTER = "base_model.model.model.layers.0.self_attn.q_proj.lora_router.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(ROUTER), "self_attn.q_proj.lora_router.weight is missing"),
        (
            lambda t: t.update({ROUTER: t[ROUTER][:7].contiguous()}),
            r"lora_router.weight is \(7, 64\), expected \(8, 64\)",
        ),
        (lambda t: t[ROUTER].fill_(float("nan")), "lora_router.weight has values that are not finite"),
        (lambda t: t.update({"what.else": torch.zeros(1)}), "unknown tensor 'what.else'"),
        (lambda t: t.update({ROUTER.replace("q_proj", "lm_head"): t[ROUTER].clone()}), "lm_head is no linear layer"),
    ],
)
async def test_a_damaged_adapter_is_refused_and_the_engine_lives(
    engine: InProcessEngine,
    adapters: dict[str, LoadedAdapter],
    make_ask: MakeAsk,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    says: str,
) -> None:
    number = 50 + abs(hash(says)) % 1000
    with pytest.raises(AdapterError, match=f"refuses adapter 'bad'.*{says}"):
        await engine.add_adapter(broken(adapters["narrow"], tmp_path / "bad", number, change))
    wide = adapters["wide"]
    assert (await engine.generate(EngineRequest(make_ask(), wide, intuition(wide, 0)))).text


async def test_too_many_rows_for_the_slots_and_folders_that_are_gone(
    engine: InProcessEngine,
    adapters: dict[str, LoadedAdapter],
    make_ask: MakeAsk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = LoadedAdapter(70, "large", tmp_path / "large")
    shutil.copytree(adapters["narrow"].path, large.path)
    config = json.loads((large.path / "adapter_config.json").read_text())
    config["trex"] |= {"r1": 4, "r2": 16}
    (large.path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"slot_rank is 64, and r1 \+ r1·r2 = 68 rows are needed.*slot_rank to 128"):
        await engine.add_adapter(large)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(TrexAdapters, "admit", lambda self, adapter: None)
        with pytest.raises(AdapterError, match=r"r1 \+ r1\*r2 = 68 rows, slots have 64"):
            await engine.add_adapter(large)
    with pytest.raises(AdapterError, match=r"lacks adapter_config.json"):
        await engine.add_adapter(LoadedAdapter(71, "gone", tmp_path / "gone"))
    wide = adapters["wide"]
    assert (await engine.generate(EngineRequest(make_ask(), wide, intuition(wide, 0)))).text


async def test_the_supervised_engine_answers_the_same(
    engine: InProcessEngine, tiny_base: Path, adapters: dict[str, LoadedAdapter], make_ask: MakeAsk
) -> None:
    wide, ask = adapters["wide"], make_ask("State the final answer as one integer. " * 6, max_tokens=16)
    async with await SupervisedEngine.start(tiny_base, SETTINGS, adapters=True) as supervised:
        await supervised.add_adapter(wide)
        cached = []
        for task in (0, 2, 0):
            request = EngineRequest(ask, wide, intuition(wide, task))
            reply = await supervised.generate(request)
            assert reply.text == (await engine.generate(request)).text
            cached.append(bool(reply.usage.cached_tokens))
        assert cached == [False, False, True]
        with pytest.raises(AskRejectedError, match="semantic vector of 3 numbers"):
            await supervised.generate(EngineRequest(ask, wide, (0.1, 0.2, 0.3)))
        with pytest.raises(AdapterError, match="lacks adapter_config.json"):
            await supervised.add_adapter(LoadedAdapter(9, "gone", tiny_base / "gone"))
        assert (await supervised.generate(EngineRequest(ask))).text


WITHOUT_PLUGIN = """
import sys, anyio
from pathlib import Path
from metier.agents.errors import AdapterError
from metier.agents.messages import Ask, Message
from metier.runtime.engines.engine import EngineRequest, LoadedAdapter
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine

async def main():
    settings = EngineSettings(eager=True, kv_cache_mib=64, max_model_tokens=512, threads=1, slot_rank=64)
    async with await InProcessEngine.start(Path(sys.argv[1]), settings, adapters=True) as engine:
        try:
            await engine.add_adapter(LoadedAdapter(1, "trex", Path(sys.argv[2])))
        except AdapterError as error:
            print("refused:", error)
        ask = Ask(run_id="r", step_path="s", role="x", messages=(Message(role="user", content="Go."),), max_tokens=4)
        print("answered:", (await engine.generate(EngineRequest(ask))).usage.answer_tokens)

anyio.run(main)
"""


def test_an_engine_without_the_plugin_refuses(
    tiny_base: Path, adapters: dict[str, LoadedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METIER_PLUGIN", "0")
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(tiny_base), str(adapters["wide"].path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "cannot be served: the plugin's T-REX part is off (METIER_PLUGIN=0)" in done.stdout
    assert "answered: 4" in done.stdout


def test_tensor_parallel_engines_refuse(adapters: dict[str, LoadedAdapter], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers are split the router's logits are partial sums; refused before the engine and by its workers."""
    from metier.runtime.plugin.adapters.trex_loader import _check_layer

    monkeypatch.setattr(wire, "STATUS", {"trex": "active"})
    with pytest.raises(AdapterError, match="tensor_parallel is 2") as caught:
        TrexAdapters(EngineSettings(tensor_parallel=2, slot_rank=64)).admit(adapters["wide"])
    assert "export" in caught.value.remedy
    split: Any = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match="split over 2 processes"):
        _check_layer("model.q_proj", {}, TrexShape.released(2, 4), {"model.q_proj": (split, 0)})


def test_shape_and_salt(adapters: dict[str, LoadedAdapter], make_ask: MakeAsk, tmp_path: Path) -> None:
    assert read_trex_shape(adapters["wide"].path) == TrexShape.released(4, 8)
    assert read_trex_shape(adapters["lora"].path) is None
    config = {"peft_type": TREX, "trex": {"format": TREX_FORMAT, "r1": 0, "r2": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"trex\.r1 is 0"):
        read_trex_shape(tmp_path)
    requests = [
        EngineRequest(make_ask(), adapters[name], c)
        for name, c in (("wide", (0.5, 0.25)), ("wide", (0.25, 0.5)), ("narrow", (0.5, 0.25)), ("wide", (0.5,)))
    ]
    assert len({cache_salt(request) for request in requests}) == 4
    assert cache_salt(requests[0]) == cache_salt(EngineRequest(make_ask("Other."), adapters["wide"], (0.5, 0.25)))
    assert cache_salt(EngineRequest(make_ask(), adapters["lora"])) is None
