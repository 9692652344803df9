"""Adapters of many forms, added as people add them, in one batch on one engine: every row as peft computes it.

Families that differ in kind: plain, norms on queries and keys, windows and scaled embeddings, fused layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from metier.runtime.engines.vllm_environment import import_vllm
from metier.specializers import Shelf
from metier.specializers.adapters.adoption import adopt_adapter
from tests.specializers.adapters.adapter_forms import Form, write_form
from tests.tiny_families import write_tiny_family

pytestmark = pytest.mark.engine

STEPS, TOP, TOLERANCE = 8, 20, 1e-4
PROMPTS = ("The planner writes a plan.", "How many legs do three dogs, two spiders and one duck have in total?")

SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LAYERS = dict.fromkeys(("llama", "llama3", "qwen3", "gemma3"), SPLIT) | {"phi3": FUSED}
WITH_EMBEDDINGS = ("llama", "llama3", "qwen3")


def forms(family: str) -> list[Form]:
    first, last = LAYERS[family][0], LAYERS[family][-1]
    found = [
        Form("plain", "served", {"r": 8, "lora_alpha": 16}, targets=LAYERS[family]),
        Form(
            "patterns",
            "served",
            {"use_rslora": True, "rank_pattern": {f"1.*{first}": 3}, "alpha_pattern": {last: 5, first: 24}},
            targets=LAYERS[family],
        ),
        Form("some layers", "served", {"layers_to_transform": [1, 3]}, targets=LAYERS[family]),
        Form("converted", "converted", {"r": 4}, "VERA", targets=[LAYERS[family][1]]),
    ]
    if family in WITH_EMBEDDINGS:
        found.append(Form("embedding", "served", targets=[last, "embed_tokens"]))
        found.append(Form("head", "served", targets=[first, "lm_head"]))
    return found


@dataclass(frozen=True)
class Row:
    """What the engine answered to one prompt with one adapter."""

    adapter: str | None
    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]


# Every day one of them; `make models` has all.
EVERY = [pytest.param(family, marks=[] if family == "llama" else [pytest.mark.models]) for family in LAYERS]


@pytest.mark.parametrize("family", EVERY)
def test_every_form_in_one_batch_agrees_with_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    base, shelf = write_tiny_family(tmp_path / "base", family), Shelf(tmp_path / "shelf")
    written: dict[str | None, Path | None] = {None: None}
    served: dict[str, Path] = {}
    for form in forms(family):
        written[form.name] = write_form(tmp_path / form.name, base, form)
        variant = adopt_adapter(tmp_path / form.name, name="it", shelf=shelf, base=base)
        served[form.name] = shelf.path(variant) / "adapter"
    rows = answers(base, served)
    worst: dict[str, float] = {}
    for name, adapter in written.items():
        for row in (row for row in rows if row.adapter == name):
            wanted = reference(base, adapter, row)
            worst[str(name)] = max(
                abs(value - float(wanted[step, token]))
                for step, top in enumerate(row.logprobs)
                for token, value in top.items()
            )
            plain = reference(base, None, row)
            assert adapter is None or (plain - wanted).abs().max() > 100 * TOLERANCE
    assert max(worst.values()) <= TOLERANCE, worst


def answers(base: Path, adapters: dict[str, Path]) -> list[Row]:
    """Every prompt on the base and on each adapter, in one batch; the last slot holds an adapter too."""
    import_vllm(threads=1, in_process=True)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(base),
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=16,
        max_model_len=256,
        max_num_seqs=16,
        max_logprobs=TOP,
        block_size=32,
        kv_cache_memory_bytes=16 << 20,
        seed=0,
    )
    requests = {name: LoRARequest(name, i + 1, str(path)) for i, (name, path) in enumerate(adapters.items())}
    for request in requests.values():
        assert llm.llm_engine.add_lora(request)
    tokenizer = llm.get_tokenizer()
    asked = [(name, tokenizer(text)["input_ids"]) for text in PROMPTS for name in (None, *adapters)]
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


def reference(base: Path, adapter: Path | None, row: Row) -> torch.Tensor:
    """Log-probabilities [STEPS, vocabulary] of the row's own tokens, by transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([row.prompt + row.tokens])).logits[0].float()
    return torch.log_softmax(logits, -1)[len(row.prompt) - 1 : -1]
