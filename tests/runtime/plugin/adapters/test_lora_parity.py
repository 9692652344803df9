"""The engine with adapters against Hugging Face and peft, in fp32: base and four adapters in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.runtime.engines.vllm_environment import import_vllm
from tests.tiny_model import LINEAR_TARGETS, write_random_lora, write_tiny_llama

pytestmark = pytest.mark.engine

STEPS = 16
TOP = 50
TOLERANCE = 1e-4

# Ranks below, at and above a vector register's share; targets that leave slices of merged layers alone.
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 8, "targets": LINEAR_TARGETS, "seed": 1},
    "attention": {"rank": 4, "targets": ("q_proj", "v_proj"), "seed": 2},
    "mlp": {"rank": 16, "targets": ("up_proj", "down_proj"), "seed": 3},
    "one": {"rank": 1, "targets": ("k_proj", "o_proj", "gate_proj"), "seed": 4, "scale": 8.0},
}
PROMPTS = (
    "The planner writes a plan.",
    "How many legs do three dogs, two spiders and one duck have in total? State the answer as one integer.",
)


@dataclass(frozen=True)
class Row:
    """What the engine answered to one prompt: its tokens, and the top log-probabilities of every step."""

    adapter: str | None
    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str | None, Path]]:
    """The tiny base under None, and each adapter under its name."""
    root = tmp_path_factory.mktemp("parity")
    with pytest.MonkeyPatch.context() as environment:
        # Compiled models of this test go away with it.
        environment.setenv("VLLM_CACHE_ROOT", str(root / "cache"))
        yield write_folders(root)


def write_folders(root: Path) -> dict[str | None, Path]:
    base = write_tiny_llama(root / "base")
    adapters = {name: write_random_lora(root / name, base, **made) for name, made in ADAPTERS.items()}
    return {None: base, **adapters}


@pytest.fixture(scope="module", params=["eager", "compiled", "reloaded"])
def rows(request: pytest.FixtureRequest, folders: dict[str | None, Path]) -> list[Row]:
    """The answers to one batch, by an engine that runs eagerly, has just compiled, or found itself compiled on disk.

    The third engine of this process has its adapters in other slots and its layers under other numbers than the second:
    if any of that were compiled in, it would answer with another adapter.
    """
    if request.param == "eager":
        return answers(folders, list(ADAPTERS), eager=True)
    compiled = answers(folders, list(ADAPTERS), eager=False)
    if request.param == "compiled":
        return compiled
    from vllm.compilation.counter import compilation_counter

    loaded = compilation_counter.num_aot_artifacts_loaded
    reloaded = answers(folders, list(reversed(ADAPTERS)), eager=False)
    assert compilation_counter.num_aot_artifacts_loaded == loaded + 1
    return reloaded


def answers(folders: dict[str | None, Path], slots: list[str], *, eager: bool) -> list[Row]:
    """One batch on one engine: every prompt on the base and on each adapter, all slots filled in the order given."""
    import_vllm(threads=2, in_process=True)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(folders[None]),
        dtype="float32",
        enforce_eager=eager,
        enable_lora=True,
        max_loras=len(slots),
        max_lora_rank=16,
        max_model_len=256,
        max_num_seqs=16,
        max_logprobs=TOP,
        block_size=32,
        kv_cache_memory_bytes=16 << 20,
        seed=0,
    )
    requests = {name: LoRARequest(name, i + 1, str(folders[name])) for i, name in enumerate(slots)}
    # The last slot holds an adapter: where stock vLLM gives base rows that adapter, the parity below would fail.
    for adapter in requests.values():
        assert llm.llm_engine.add_lora(adapter)
    tokenizer = llm.get_tokenizer()
    asked = [(name, tokenizer(text)["input_ids"]) for text in PROMPTS for name in (None, *ADAPTERS)]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in asked],
        SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, logprobs=TOP),
        lora_request=[requests[name] if name else None for name, _ in asked],
        use_tqdm=False,
    )
    return [
        Row(
            name,
            prompt,
            list(output.outputs[0].token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs],
        )
        for (name, prompt), output in zip(asked, outputs, strict=True)
    ]


def references(folders: dict[str | None, Path], rows: list[Row]) -> Iterator[tuple[Row, torch.Tensor]]:
    """Yield each row with the reference's log-probabilities [STEPS, vocabulary] on the very same tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for name in (None, *ADAPTERS):
        model = AutoModelForCausalLM.from_pretrained(folders[None], dtype=torch.float32).eval()
        if name is not None:
            model = PeftModel.from_pretrained(model, str(folders[name])).eval()
        for row in (row for row in rows if row.adapter == name):
            with torch.inference_mode():
                logits = model(torch.tensor([row.prompt + row.tokens])).logits[0]
            yield row, torch.log_softmax(logits, -1)[len(row.prompt) - 1 : -1]


def test_every_row_agrees_with_the_reference(folders: dict[str | None, Path], rows: list[Row]) -> None:
    worst: dict[str, float] = {}
    for row, wanted in references(folders, rows):
        assert len(row.tokens) == STEPS
        for step, got in enumerate(row.logprobs):
            difference = max(abs(value - float(wanted[step, token])) for token, value in got.items())
            worst[str(row.adapter)] = max(worst.get(str(row.adapter), 0.0), difference)
    assert max(worst.values()) <= TOLERANCE, worst


def test_the_adapters_matter(rows: list[Row]) -> None:
    """Without this the parity above could hold because nothing was applied at all."""
    for text in range(len(PROMPTS)):
        batch = rows[text * (len(ADAPTERS) + 1) : (text + 1) * (len(ADAPTERS) + 1)]
        base = batch[0].logprobs[0]
        for row in batch[1:]:
            shared = base.keys() & row.logprobs[0].keys()
            assert max(abs(base[token] - row.logprobs[0][token]) for token in shared) > 100 * TOLERANCE
