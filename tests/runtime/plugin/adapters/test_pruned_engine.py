"""Pruned checkpoints in the real engine: it opens each one unpatched and gives the logits Hugging Face gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.agents import Message, TrafficRow, write_traffic
from metier.runtime.engines.vllm_environment import import_vllm
from metier.specializers import Recipe, Shelf, produce
from tests.tiny_model import write_tiny_llama

pytestmark = pytest.mark.engine

STEPS = 12
TOP = 50
TOLERANCE = 1e-4
PROMPTS = ("The planner writes a plan.", "How many legs do three dogs have?")

PAT = {
    "method": "pat",
    "lora_rank": 4,
    "operator_rank": 4,
    "steps": 6,
    "batch_rows": 4,
    "warmup_steps": 1,
    "milestone_share": 0.5,
    "learning_rate": 0.01,
    "dtype": "float32",
}
# name → (the method's settings, the architecture it is exported as); the base has 6 heads and 96 channels.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({**PAT, "hidden_size": 48}, "LlamaForCausalLM"),
    "mistral": ({**PAT, "hidden_size": 64}, "MistralForCausalLM"),
    "untied": ({**PAT, "hidden_size": 64, "embedding_operator": "trained"}, "MistralForCausalLM"),
    "width": ({"method": "width_pruning", "intermediate_size": 192}, "LlamaForCausalLM"),
    "depth": ({"method": "depth_pruning", "layers": 2}, "LlamaForCausalLM"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("pruned")
    write_tiny_llama(place / "base", hidden=96, heads=6, kv_heads=3, layers=3, intermediate=256)
    write_traffic(
        place / "rows.jsonl",
        [
            TrafficRow(
                role="solver",
                messages=(Message(role="user", content=f"{a} plus {a + 1}"),),
                reply=f'{{"value":{2 * a + 1}}}',
                score=1.0,
            )
            for a in range(12)
        ],
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CACHE_ROOT", str(place / "cache"))  # compiled models of this test go away with it
        yield place


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_gives_the_merged_models_logits(root: Path, name: str) -> None:
    settings, architecture = VARIANTS[name]
    recipe = Recipe.model_validate(
        {"name": name, "data": {"traffic": "rows.jsonl"}, "methods": [settings], "folder": root}
    )
    shelf = Shelf(root / "shelf")
    weights = shelf.path(produce(recipe, shelf=shelf, base=root / "base")) / "weights"
    assert json.loads((weights / "config.json").read_text())["architectures"] == [architecture]
    prompts, outputs = answers(weights)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.token_ids)
        with torch.inference_mode():
            wanted = torch.log_softmax(model(torch.tensor([prompt + tokens])).logits[0], -1)[len(prompt) - 1 : -1]
        assert len(tokens) == STEPS
        for step, entries in enumerate(output.logprobs):
            assert max(abs(e.logprob - float(wanted[step, token])) for token, e in entries.items()) <= TOLERANCE


def answers(weights: Path) -> tuple[list[list[int]], list[Any]]:
    """Greedy answers of an engine on that checkpoint, with the top log-probabilities of every step."""
    import_vllm(threads=1, in_process=True)
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(weights),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        max_logprobs=TOP,
        block_size=32,
        kv_cache_memory_bytes=8 << 20,
        seed=0,
    )
    tokenizer = llm.get_tokenizer()
    prompts = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, logprobs=TOP),
        use_tqdm=False,
    )
    return prompts, [output.outputs[0] for output in outputs]
