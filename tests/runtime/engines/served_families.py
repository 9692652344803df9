"""One engine on a tiny base, asked with and without adapters in one batch, against transformers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import torch

from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.plugin.wire import INTUITION_KEY
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.slots.adapter import LoadedAdapter
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.methods.trained import linear_targets
from tests.runtime.conftest import TINY
from tests.tiny_model import write_random_lora
from tests.tiny_trex import TASKS, write_random_trex

__all__ = ["adaptable_layers", "served_differences"]

TOKENS = list(range(40, 90))
"""More than a tiny window holds."""


def served_differences(
    base: Path, work: Path, *, adapters: bool = True, settings: EngineSettings = TINY
) -> dict[str, float]:
    """Largest difference of log-probability, in nats, for base, two LoRA and a T-REX adapter asked in one batch.

    Adapters are random and written into `work`. Each kind must change the base's log-probabilities, so that none
    can be ignored unseen. Without `adapters` the base is asked alone, of an engine that has no room for any.
    """
    if not adapters:
        alone = anyio.run(_served, base, {}, (), settings)
        return {"base": float((alone["base"] - _expected(base)).abs().max())}
    targets = adaptable_layers(base)
    folders = {
        "lora": write_random_lora(work / "lora", base, rank=4, seed=1, targets=targets),
        "lora of another rank": write_random_lora(work / "lora2", base, rank=8, seed=2, targets=targets),
        "trex": write_random_trex(work / "trex", base, r1=2, r2=2, targets=targets),
    }
    intuition = SemanticMap.load(folders["trex"]).intuition(TASKS[3])
    served = anyio.run(_served, base, folders, intuition, settings)
    expected = {"base": _expected(base)}
    for name, folder in folders.items():
        expected[name] = _expected(base, folder, intuition if name == "trex" else None)
        assert (expected[name] - expected["base"]).abs().max() > 0.05, name
    return {name: float((served[name] - expected[name]).abs().max()) for name in expected}


def adaptable_layers(base: Path) -> list[str]:
    """Last names of the linear layers of a base that adapters are made for."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    if any(isinstance(module, Conv1D) for module in model.modules()):
        return ["c_attn", "c_fc", "c_proj"]
    return linear_targets(model, "all-linear")


async def _served(
    base: Path, folders: dict[str, Path], intuition: tuple[float, ...], settings: EngineSettings
) -> dict[str, torch.Tensor]:
    settings = settings.model_copy(update={"adapter_slots": 3})
    engine = await InProcessEngine.start(base, settings, adapters=bool(folders))
    try:
        adapters = {
            name: LoadedAdapter(number=number, id=name, path=folder)
            for number, (name, folder) in enumerate(folders.items(), 1)
        }
        for adapter in adapters.values():
            await engine.add_adapter(adapter)
        found: dict[str, torch.Tensor] = await engine._in_thread(lambda: _one_batch(engine, adapters, intuition))
        return found
    finally:
        await engine.close()


def _one_batch(
    engine: InProcessEngine, adapters: dict[str, LoadedAdapter], intuition: tuple[float, ...]
) -> dict[str, torch.Tensor]:
    from vllm.inputs.engine import tokens_input
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams

    llm: Any = engine._llm._llm
    for name in ("base", *adapters):
        adapter = adapters.get(name)
        told = {INTUITION_KEY: list(intuition)} if name == "trex" else None
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, extra_args=told)
        lora = None if adapter is None else LoRARequest(adapter.id, adapter.number, str(adapter.path))
        llm.add_request(name, tokens_input(TOKENS), params, lora_request=lora)
    found: dict[str, torch.Tensor] = {}
    while len(found) < 1 + len(adapters):
        for output in llm.step():
            if output.finished:
                rows = zip(output.prompt_logprobs[1:], TOKENS[1:], strict=True)
                found[output.request_id] = torch.tensor([row[token].logprob for row, token in rows])
    return found


def _expected(base: Path, adapter: Path | None = None, intuition: tuple[float, ...] | None = None) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter is not None:
        from peft import PeftModel

        import metier.specializers.methods.trex.tuner  # noqa: F401 - registers the method

        model = PeftModel.from_pretrained(model, adapter).eval()
    told = {} if intuition is None else {"intuition": torch.tensor([intuition])}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS]), **told).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
