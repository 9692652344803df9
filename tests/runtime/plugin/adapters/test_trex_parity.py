"""T-REX in the engine against Hugging Face, in fp32: base, LoRA and T-REX rows in one batch, each token under its gate.

The reference is written out here, from the method's definition; a second one is the tuner that trains such adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metier.agents.messages import Ask
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.trex_asks import cache_salt
from metier.runtime.engines.vllm_environment import import_vllm
from metier.runtime.plugin.wire import INTUITION_KEY
from metier.runtime.slots.adapter import LoadedAdapter
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.adapters.trex_shape import SHARPNESS
from tests.tiny_model import LINEAR_TARGETS, write_random_lora, write_tiny_llama
from tests.tiny_trex import TASKS, write_random_trex

pytestmark = pytest.mark.engine

STEPS = 24
TOP = 50
TOLERANCE = 1e-4
CHUNK = 48  # tokens of one step where prompts are prefilled in chunks

LORAS: dict[str, dict[str, Any]] = {
    "lora all": {"rank": 8, "targets": LINEAR_TARGETS, "seed": 1},
    "lora attention": {"rank": 4, "targets": ("q_proj", "v_proj"), "seed": 2},
}
# The second leaves slices of merged layers alone and fills no vector register; it stands in the last slot.
TREXES: dict[str, dict[str, Any]] = {
    "trex 4x8": {"r1": 4, "r2": 8, "targets": LINEAR_TARGETS, "seed": 3},
    "trex 2x3": {"r1": 2, "r2": 3, "targets": ("q_proj", "k_proj", "up_proj", "down_proj"), "seed": 4},
}
PROMPTS = (
    "The planner writes a plan.",
    "How many legs do three dogs, two spiders and one duck have in total? State the answer as one integer. " * 3,
)
# Adapter and task of each row of the batch: one T-REX adapter twice, with different semantic vectors.
ROWS: tuple[tuple[str | None, str | None], ...] = (
    (None, None),
    ("lora all", None),
    ("lora attention", None),
    ("trex 4x8", TASKS[0]),
    ("trex 4x8", TASKS[3]),
    ("trex 2x3", TASKS[1]),
)


@dataclass(frozen=True)
class Row:
    """What the engine answered to one prompt: its tokens, the top log-probabilities of every step, its cache hits."""

    adapter: str | None
    c: tuple[float, ...] | None
    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int


Folders = dict[str | None, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    """The tiny base under None, and each adapter under its name."""
    root = tmp_path_factory.mktemp("trex-parity")
    base = write_tiny_llama(root / "base")
    adapters = {name: write_random_lora(root / name, base, **made) for name, made in LORAS.items()}
    adapters |= {name: write_random_trex(root / name, base, **made) for name, made in TREXES.items()}
    with pytest.MonkeyPatch.context() as environment:
        # Compiled models of this test go away with it.
        environment.setenv("VLLM_CACHE_ROOT", str(root / "cache"))
        yield {None: base, **adapters}


@dataclass
class Engine:
    """An engine with all adapters loaded, and a way to ask it the whole batch."""

    llm: Any
    folders: Folders

    def answers(self, prompts: tuple[str, ...] = PROMPTS) -> list[Row]:
        """One batch: every prompt for every entry of ROWS."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        tokenizer, numbers = self.llm.get_tokenizer(), [*LORAS, *TREXES]
        asked = []
        for text in prompts:
            for name, task in ROWS:
                c = None if task is None else SemanticMap.load(self.folders[name]).intuition(task)
                asked.append((name, c, tokenizer(text)["input_ids"]))
        outputs = self.llm.generate(
            [
                {"prompt_token_ids": prompt} | ({} if c is None else {"cache_salt": salt(str(name), c)})
                for name, c, prompt in asked
            ],
            [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=STEPS,
                    ignore_eos=True,
                    logprobs=TOP,
                    extra_args=None if c is None else {INTUITION_KEY: list(c)},
                )
                for _, c, _ in asked
            ],
            lora_request=[
                LoRARequest(name, numbers.index(name) + 1, str(self.folders[name])) if name else None
                for name, _, _ in asked
            ],
            use_tqdm=False,
        )
        return [
            Row(
                name,
                c,
                prompt,
                list(output.outputs[0].token_ids),
                [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs],
                output.num_cached_tokens,
            )
            for (name, c, prompt), output in zip(asked, outputs, strict=True)
        ]


def salt(name: str, c: tuple[float, ...]) -> str:
    ask = Ask(run_id="run", step_path="step", role="solver", messages=())
    found = cache_salt(EngineRequest(ask, LoadedAdapter(1, name, Path()), c))
    assert found is not None
    return found


def start_engine(folders: Folders, *, eager: bool, batch_tokens: int) -> Engine:
    import_vllm(threads=2, in_process=True)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(folders[None]),
        dtype="float32",
        enforce_eager=eager,
        enable_lora=True,
        max_loras=len(LORAS) + len(TREXES),
        max_lora_rank=64,
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=batch_tokens,
        max_logprobs=TOP,
        block_size=32,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=16 << 20,
        seed=0,
    )
    for number, name in enumerate([*LORAS, *TREXES], start=1):
        assert llm.llm_engine.add_lora(LoRARequest(name, number, str(folders[name])))
    return Engine(llm, folders)


@pytest.fixture(scope="module")
def chunked(folders: Folders) -> Engine:
    """Prompts longer than a step, so prefill comes in chunks beside the decoding of others."""
    return start_engine(folders, eager=True, batch_tokens=CHUNK)


class TrexReference(torch.nn.Module):
    """A linear layer with a T-REX adapter, as the method defines it; c [r1·r2] is one sequence's."""

    def __init__(self, layer: torch.nn.Module, own: dict[str, torch.Tensor], block: dict[str, Any], c: torch.Tensor):
        super().__init__()
        self.layer, self.own, self.block, self.c = layer, own, block, c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, block = self.own, self.block
        alpha, strength = torch.sigmoid(SHARPNESS * own["trex_omega"]), torch.sigmoid(SHARPNESS * own["trex_gamma"])
        h = x @ own["lora_A.weight"].T
        p = torch.softmax(x @ own["lora_router.weight"].T, -1)
        g = block["k_tok"] * alpha * p + block["k_task"] * (1 - alpha) * self.c
        z = torch.zeros(*x.shape[:-1], block["r2"])
        for i in range(block["r1"]):
            for j in range(block["r2"]):
                z[..., j] += h[..., i] * g[..., i * block["r2"] + j]
        result: torch.Tensor = self.layer(x) + strength * (z @ own["lora_B.weight"].T)
        return result


def by_definition(folders: Folders, name: str | None, c: tuple[float, ...] | None) -> Callable[[torch.Tensor], Any]:
    """The model with one adapter, as a function from tokens [1, n] to logits [1, n, vocabulary]."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[None], dtype=torch.float32).eval()
    if name in LORAS:
        model = PeftModel.from_pretrained(model, str(folders[name])).eval()
    elif name is not None:
        tensors = load_file(folders[name] / "adapter_model.safetensors")
        block = json.loads((folders[name] / "adapter_config.json").read_text())["trex"]
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            module, found, part = key.removeprefix("base_model.model.").partition("_proj.")
            if found:
                layers.setdefault(f"{module}_proj", {})[part] = tensor
        for path, own in layers.items():
            parent, _, child = path.rpartition(".")
            layer = TrexReference(model.get_submodule(path), own, block, torch.tensor(c))
            setattr(model.get_submodule(parent), child, layer)
    return lambda ids: model(ids).logits


def by_the_tuner(folders: Folders, name: str | None, c: tuple[float, ...] | None) -> Callable[[torch.Tensor], Any]:
    """The same model as PEFT loads it, through the tuner that trains T-REX."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import metier.specializers.methods.trex.tuner  # noqa: F401 - registers the method

    model = AutoModelForCausalLM.from_pretrained(folders[None], dtype=torch.float32).eval()
    peft = PeftModel.from_pretrained(model, str(folders[name])).eval()
    return lambda ids: peft(input_ids=ids, intuition=torch.tensor([c])).logits


def worst_difference(
    folders: Folders, rows: list[Row], reference: Callable[..., Callable[[torch.Tensor], Any]]
) -> dict[str, float]:
    """Largest |Δ log-probability| over the top tokens of every step, per row of the batch, on the very same tokens."""
    worst: dict[str, float] = {}
    for name, c in dict.fromkeys((row.adapter, row.c) for row in rows):
        model = reference(folders, name, c)
        for row in (row for row in rows if (row.adapter, row.c) == (name, c)):
            assert len(row.tokens) == STEPS
            with torch.inference_mode():
                logits = model(torch.tensor([row.prompt + row.tokens]))[0]
            wanted = torch.log_softmax(logits, -1)[len(row.prompt) - 1 : -1]
            for step, got in enumerate(row.logprobs):
                assert len(got) >= TOP
                difference = max(abs(value - float(wanted[step, token])) for token, value in got.items())
                key = f"{name} {hash(c)}"
                worst[key] = max(worst.get(key, 0.0), difference)
    return worst


def test_chunked_prefill_and_cache_hits_agree_with_the_definition(folders: Folders, chunked: Engine) -> None:
    first = chunked.answers()
    assert any(len(row.prompt) > CHUNK for row in first)
    worst = worst_difference(folders, first, by_definition)
    assert len(worst) == len(ROWS) and max(worst.values()) <= TOLERANCE, worst

    again = chunked.answers()
    for row in again:
        # All whole blocks but the one with the last token, of the same adapter and vector only.
        assert row.cached == (len(row.prompt) - 1) // 32 * 32
    worst = worst_difference(folders, again, by_definition)
    assert max(worst.values()) <= TOLERANCE, worst


def test_the_tuner_agrees_too(folders: Folders, chunked: Engine) -> None:
    rows = [row for row in chunked.answers() if row.adapter in TREXES]
    worst = worst_difference(folders, rows, by_the_tuner)
    assert len(worst) == 3 and max(worst.values()) <= TOLERANCE, worst


def test_the_gate_and_the_vector_matter(chunked: Engine) -> None:
    """Without this the parity above could hold because nothing was applied at all."""
    rows = chunked.answers()[: len(ROWS)]
    for one in range(len(rows)):
        for other in range(one):
            shared = rows[one].logprobs[0].keys() & rows[other].logprobs[0].keys()
            apart = max(abs(rows[one].logprobs[0][token] - rows[other].logprobs[0][token]) for token in shared)
            assert apart > 20 * TOLERANCE, (ROWS[one], ROWS[other], apart)


def test_other_vectors_share_no_blocks(folders: Folders, chunked: Engine) -> None:
    """The same prompt and adapter with a vector that differs in one number starts from an empty cache."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    name = "trex 4x8"
    prompt = chunked.llm.get_tokenizer()(PROMPTS[1] + "Twelve plus seven.")["input_ids"]
    lora = LoRARequest(name, [*LORAS, *TREXES].index(name) + 1, str(folders[name]))
    c = SemanticMap.load(folders[name]).intuition(TASKS[5])

    def cached(vector: tuple[float, ...]) -> int:
        (output,) = chunked.llm.generate(
            {"prompt_token_ids": prompt, "cache_salt": salt(name, vector)},
            SamplingParams(max_tokens=1, extra_args={INTUITION_KEY: list(vector)}),
            lora_request=lora,
            use_tqdm=False,
        )
        return int(output.num_cached_tokens)

    other = (*c[:-1], c[-1] + 1e-6)
    assert [cached(c), cached(other), cached(c), cached(other)] == [0, 0, *[(len(prompt) - 1) // 32 * 32] * 2]


def test_compiled_engine_agrees_with_the_definition(folders: Folders) -> None:
    worst = worst_difference(folders, start_engine(folders, eager=False, batch_tokens=512).answers(), by_definition)
    assert len(worst) == len(ROWS) and max(worst.values()) <= TOLERANCE, worst


def test_torch_path_agrees_with_the_definition(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves where there is no C++ compiler."""
    import_vllm(threads=2, in_process=True)
    from metier.runtime.plugin.adapters import lora_operators

    monkeypatch.setattr(lora_operators, "_trusted", False)
    rows = start_engine(folders, eager=True, batch_tokens=512).answers(PROMPTS[:1])
    worst = worst_difference(folders, rows, by_definition)
    assert len(worst) == len(ROWS) and max(worst.values()) <= TOLERANCE, worst
