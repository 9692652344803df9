"""Few-bit checkpoints in the real engine: its logits are those of the dequantised model, with and without adapters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from metier.agents import Ask
from metier.runtime.engines.answer_check import check_answers
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.plugin.wire import INTUITION_KEY
from metier.runtime.slots.adapter import LoadedAdapter
from metier.specializers import Recipe, Shelf, produce
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.checkpoints import self_check
from metier.specializers.checkpoints.checkpoint_files import CheckpointReader
from metier.specializers.checkpoints.dense_model import load_dense_model
from metier.specializers.checkpoints.quantisers import round_activations
from metier.specializers.checkpoints.stored_weights import rounds_inputs
from tests.runtime.conftest import TINY
from tests.runtime.processor import skip_without_int4_kernels, skip_without_int8_kernels
from tests.tiny_model import write_random_lora, write_tiny_llama
from tests.tiny_trex import TASKS, write_random_trex

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

METHODS: dict[str, dict[str, Any]] = {
    "w8a8": {"scheme": "w8a8"},
    "w4a16": {"scheme": "w4a16", "group_size": 32},
    "mixed": {
        "scheme": "w4a16",
        "overrides": {"*.layers.1.*": "w8a8"},
        "ignore": ["*.layers.0.self_attn.*"],
    },
}
TOKENS = list(range(40, 80))
# Nats; bfloat16 sums in another order come to about 0.1 on this model, whose logits spread over ten.
TOLERANCE = 0.2
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def bfloat16_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("bf16") / "base", dtype="bfloat16")


@pytest.fixture(scope="module", params=METHODS)
def weights(request: pytest.FixtureRequest, bfloat16_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = {"method": "ptq", "perplexity_windows": 0, **METHODS[request.param]}
    if method["scheme"] == "w4a16":
        skip_without_int4_kernels()
    if request.param != "w4a16":
        skip_without_int8_kernels()
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    recipe = Recipe.model_validate({"name": request.param, "methods": [method]})
    return shelf.path(produce(recipe, shelf=shelf, base=bfloat16_base)) / "weights"


@pytest.fixture(scope="module")
def engine(weights: Path) -> Iterator[InProcessEngine]:
    start = partial(InProcessEngine.start, weights, TINY, adapters=True, dtype="bfloat16", name="quantised")
    started = anyio.run(start)
    yield started
    anyio.run(started.close)


def served_logprobs(
    engine: InProcessEngine,
    tokens: list[int],
    adapter: LoadedAdapter | None = None,
    intuition: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """What the engine thinks of each token but the first, given those before it; runs in the stepping thread."""
    from vllm.inputs.engine import tokens_input
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams

    llm = engine._llm._llm
    told = None if intuition is None else {INTUITION_KEY: list(intuition)}
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, extra_args=told)
    lora = None if adapter is None else LoRARequest(adapter.id, adapter.number, str(adapter.path))
    llm.add_request("logits", tokens_input(tokens), params, lora_request=lora)
    while True:
        for output in llm.step():
            if output.finished:
                found = output.prompt_logprobs[1:]
                return torch.tensor([f[t].logprob for f, t in zip(found, tokens[1:], strict=True)])


def expected_logprobs(
    weights: Path, tokens: list[int], adapter: Path | None = None, intuition: tuple[float, ...] | None = None
) -> torch.Tensor:
    """The same from transformers on dequantised weights, with the inputs of W8A8 layers rounded as kernels do."""
    model = load_dense_model(weights, torch.bfloat16)
    reader = CheckpointReader(weights)
    int8 = [module for name, module in model.named_modules() if rounds_inputs(reader, name)]
    if adapter is not None:
        from peft import PeftModel

        import metier.specializers.methods.trex.tuner  # noqa: F401 - registers the method

        model = PeftModel.from_pretrained(model, adapter)
    for module in int8:
        module.register_forward_pre_hook(lambda _m, args: (round_activations(args[0]).bfloat16(),))
    told = {} if intuition is None else {"intuition": torch.tensor([intuition])}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), **told).logits[0, :-1].float().log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


async def test_logits_are_those_of_the_dequantised_model(
    engine: InProcessEngine, weights: Path, bfloat16_base: Path
) -> None:
    served = await engine._in_thread(lambda: served_logprobs(engine, TOKENS))
    assert (served - expected_logprobs(weights, TOKENS)).abs().max() < TOLERANCE
    if weights_are_int4(weights):  # coarse enough for the tolerance to tell them from the weights before rounding
        assert (served - expected_logprobs(bfloat16_base, TOKENS)).abs().max() > 2 * TOLERANCE


async def test_adapters_add_to_the_dequantised_model(
    engine: InProcessEngine, weights: Path, tmp_path: Path, make_ask: Callable[..., Ask]
) -> None:
    folder = write_random_lora(tmp_path / "lora", weights, rank=4, dtype="bfloat16")
    adapter = LoadedAdapter(number=next(NUMBERS), id=f"lora-{tmp_path.name}", path=folder)
    await engine.add_adapter(adapter)
    served = await engine._in_thread(lambda: served_logprobs(engine, TOKENS, adapter))
    expected = expected_logprobs(weights, TOKENS, folder)
    assert (served - expected).abs().max() < TOLERANCE
    assert (expected - expected_logprobs(weights, TOKENS)).abs().max() > 3 * TOLERANCE
    # Rows with and without the adapter in one batch answer what they answer alone.
    asks = [EngineRequest(make_ask("Add 12 and 7.", max_tokens=12), which) for which in (None, adapter)]
    alone = [(await engine.generate(ask)).text for ask in asks]
    together: dict[int, str] = {}

    async def one(number: int) -> None:
        together[number] = (await engine.generate(asks[number % 2])).text

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(one, number)
    assert together == {number: alone[number % 2] for number in range(4)}
    assert alone[0] != alone[1]
    await engine.remove_adapter(adapter)


async def test_trex_adapters_add_to_the_dequantised_model(
    engine: InProcessEngine, weights: Path, tmp_path: Path
) -> None:
    folder = write_random_trex(tmp_path / "trex", weights, r1=2, r2=2, dtype="bfloat16")
    intuition = SemanticMap.load(folder).intuition(TASKS[3])
    adapter = LoadedAdapter(number=next(NUMBERS), id=f"trex-{tmp_path.name}", path=folder)
    await engine.add_adapter(adapter)
    served = await engine._in_thread(lambda: served_logprobs(engine, TOKENS, adapter, intuition))
    expected = expected_logprobs(weights, TOKENS, folder, intuition)
    assert (served - expected).abs().max() < TOLERANCE
    assert (expected - expected_logprobs(weights, TOKENS)).abs().max() > 3 * TOLERANCE
    await engine.remove_adapter(adapter)


async def test_the_engine_answers_what_the_checkpoint_says(engine: InProcessEngine, weights: Path) -> None:
    """Random weights are sure of nothing; log-probabilities are compared."""
    known = self_check.read_self_check({"self_check": self_check.make_self_check(weights)})
    assert len(known) == len(self_check.PROMPTS)
    await check_answers(engine, known)


def weights_are_int4(weights: Path) -> bool:
    return any(name.endswith(".weight_packed") for name in CheckpointReader(weights).tensors)
