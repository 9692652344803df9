"""What the T-REX gate costs when served, and what serving gains over Hugging Face generate on the same adapter.

One engine holds four random adapters each of T-REX (r1 = 4, r2 = 8: 36 rows of a slot), LoRA of rank 36 and LoRA of
rank 8, so a round compares them in one process; "base" is an engine started without `enable_lora`. All engines are
compiled. A further one runs in fp32. "Hugging Face" is peft's `generate` through the tuner that trains T-REX. Every
engine lives in a process of its own and they take turns, round by round; ratios are taken within a round, and disturbed
samples are measured again (`engine_process.py`).

    python benchmarks/trex_decode.py --rounds 5
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from engine_process import Compared, Sample, Worker, add, answer_with, compare, decode, measured, prompt, small_engine
from harness import arguments, print_table, spread

from metier.runtime.plugin.wire import INTUITION_KEY
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.shelf.base_model import find_base

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny_model import write_random_lora  # noqa: E402 - they live with the tests
from tests.tiny_trex import TASKS, write_random_trex  # noqa: E402

R1, R2 = 4, 8
EACH = 4  # adapters of each kind
SLOT_RANK = 64
KINDS = ("LoRA 8", "LoRA 36", "T-REX")
MIX = [None, "LoRA 8/0", "LoRA 8/1", "LoRA 8/2", "T-REX/0", "T-REX/1"]

# Workload → adapters of its sequences; None is a row of the base.
DECODES: dict[str, list[str | None]] = {
    "base, batch 16": [None] * 16,
    "base, batch 1": [None],
    "mixed, batch 16": list(islice(cycle(MIX), 16)),
} | {
    f"{kind}, batch {batch}": [f"{kind}/{index % EACH}" for index in range(batch)]
    for kind in KINDS
    for batch in (16, 1)
}
SERVE = "16 prompts answered on T-REX"

WORKERS: dict[str, list[str]] = {
    "base": ["base, batch 16", "base, batch 1"],
    "ours": [name for name in DECODES if not name.startswith("base")] + [SERVE],
    "ours fp32": [SERVE],
    "Hugging Face": [SERVE],
    "Hugging Face fp32": [SERVE],
}


def main() -> None:
    """Parse the command line, run the rounds, print the tables."""
    parser = arguments(__doc__, rounds=5, base=True, threads=2)
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--answer-tokens", type=int, default=32, help="tokens of a served answer (default 32)")
    parser.add_argument("--retries", type=int, default=3, help="repeats of a disturbed sample (default 3)")
    parser.add_argument("--workers", nargs="+", default=list(WORKERS), choices=list(WORKERS), metavar="NAME")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work = hugging_face if options.worker.startswith("Hugging") else engine
        answer_with(work(options))
        return
    options.base = str(find_base(options.base))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as our engines set it; for all processes alike
    with tempfile.TemporaryDirectory(prefix="metier-trex-bench-") as scratch:
        options.adapters = Path(scratch)
        write_adapters(options.adapters, Path(options.base))
        start = {name: partial(start_worker, name, options) for name in options.workers}
        report(compare(start, {name: WORKERS[name] for name in start}, options), options)


def write_adapters(folder: Path, base: Path) -> None:
    """`EACH` adapters of every kind, in bf16: what they cost does not depend on what they say."""
    for index in range(EACH):
        for kind in KINDS:
            target = folder / kind / str(index)
            if kind == "T-REX":
                write_random_trex(target, base, r1=R1, r2=R2, seed=index, weight_std=0.01, dtype="bfloat16")
            else:
                rank = int(kind.split()[1])
                write_random_lora(target, base, rank=rank, seed=index, weight_std=0.01, dtype="bfloat16")


def start_worker(name: str, options: argparse.Namespace) -> Worker:
    """A process of this program that is the engine `name`."""
    arguments = [__file__, "--worker", name, "--adapters", str(options.adapters)]
    for setting in ("base", "steps", "answer_tokens", "threads"):
        arguments += [f"--{setting.replace('_', '-')}", str(getattr(options, setting))]
    return Worker(arguments, threads=options.threads)


# ---- the processes ----------------------------------------------------------------------------------------------


def engine(options: argparse.Namespace) -> Callable[[str], Sample]:
    """A vLLM engine with the plugin, and how it measures a workload."""
    from vllm.lora.request import LoRARequest

    folders = {f"{kind}/{index}": options.adapters / kind / str(index) for kind in KINDS for index in range(EACH)}
    lora: dict[str, Any] = {}
    if options.worker != "base":
        lora = {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": SLOT_RANK}
    dtype = "float32" if options.worker.endswith("fp32") else "bfloat16"
    sizes: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory_bytes": 256 << 20}
    llm = small_engine(options.base, dtype=dtype, **sizes, **lora)
    requests: dict[str | None, Any] = {None: None}
    if lora:
        for number, (name, folder) in enumerate(folders.items(), start=1):
            requests[name] = LoRARequest(name, number, str(folder))
            llm.add_lora(requests[name])

    def measure(workload: str) -> Sample:
        names: list[str | None] = ["T-REX/0"] * 16 if workload == SERVE else DECODES[workload]
        asked = [requests[name] for name in names]
        extra = [
            intuition_of(folders[name], row) if name and "T-REX" in name else None for row, name in enumerate(names)
        ]
        if workload == SERVE:
            return answer(llm, asked, extra, options.answer_tokens)
        return decode(llm, asked, options.steps, extra)

    return measure


def intuition_of(folder: Path, row: int) -> dict[str, Any]:
    """What a request to a T-REX adapter carries: every row of a batch has a task, and so a vector, of its own."""
    return {INTUITION_KEY: list(SemanticMap.load(folder).intuition(TASKS[row]))}


def answer(engine: Any, requests: list[Any], extra: Sequence[dict[str, Any] | None], tokens: int) -> Sample:
    """Answer a batch of prompts from the first token to the last."""
    first: list[float] = []

    def work() -> None:
        for row, request in enumerate(requests):
            add(engine, f"s{row}", prompt(24, row), tokens, request, extra[row])
        while engine.has_unfinished_requests():
            if engine.step() and not first:
                first.append(time.perf_counter())

    started = time.perf_counter()
    sample = measured(tokens * len(requests), work)
    return replace(sample, first_token_s=first[0] - started)


def hugging_face(options: argparse.Namespace) -> Callable[[str], Sample]:
    """The same adapter in Hugging Face, and how it answers the same prompts."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, StoppingCriteriaList

    import metier.specializers.methods.trex.tuner  # noqa: F401 - teaches peft the method

    torch.set_num_threads(options.threads)
    folder, dtype = options.adapters / "T-REX" / "0", torch.float32 if "fp32" in options.worker else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=dtype).eval()
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.tensor([prompt(24, row) for row in range(16)])
    c = torch.tensor([intuition_of(folder, row)[INTUITION_KEY] for row in range(16)])

    def measure(workload: str) -> Sample:
        first: list[float] = []

        def clock(found: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            first.append(time.perf_counter())
            return torch.zeros(len(found), dtype=torch.bool)

        def work() -> None:
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    intuition=c,
                    do_sample=False,
                    min_new_tokens=options.answer_tokens,
                    max_new_tokens=options.answer_tokens,
                    pad_token_id=0,
                    stopping_criteria=StoppingCriteriaList([clock]),
                )

        started = time.perf_counter()
        sample = measured(options.answer_tokens * len(ids), work)
        return replace(sample, first_token_s=first[0] - started)

    return measure


# ---- the tables -------------------------------------------------------------------------------------------------


def report(samples: Compared, options: argparse.Namespace) -> None:
    """Print the decode table, the ratios with their bars, and the comparison with Hugging Face."""
    measured = list(samples)
    most = max(sample.others for arm in measured for sample in samples[arm])
    print(f"\nT-REX r1={R1}, r2={R2}, slot rank {SLOT_RANK}, {options.threads} threads, {options.rounds} rounds,")
    print(f"compiled engines, bf16 unless said, other programs' share at most {most:.0%}\n")
    decodes = [arm for arm in measured if arm[1] != SERVE]
    print_table(("decode", "tokens/s", "CPU s per 1k"), [(arm[1], *columns(samples, arm)) for arm in decodes])
    rows = []
    for batch in (16, 1):
        for other in ("LoRA 36", "LoRA 8"):
            bar = "<= 1.15" if (batch, other) == (16, "LoRA 36") else ""
            trex, lora = (("ours", f"{kind}, batch {batch}") for kind in ("T-REX", other))
            if trex in measured and lora in measured:
                times = ratio(samples, lora, trex, "tokens_per_s"), ratio(samples, trex, lora, "cpu_s_per_1k")
                rows.append((f"T-REX step / {other} step, batch {batch}", *times, bar))
    print()
    print_table(("ratio within rounds", "wall time", "CPU time", "bar"), rows)
    mixed, alone = ("ours", "mixed, batch 16"), ("base", "base, batch 16")
    if mixed in measured and alone in measured:
        both = [ratio(samples, mixed, alone, name) for name in ("tokens_per_s", "cpu_s_per_1k")]
        print()
        print_table(
            ("mixed batch of base, 3 LoRA 8, 2 T-REX", "speed", "CPU time", "bar"),
            [("/ engine without adapters, batch 16", *both, ">= 0.75")],
        )
    served = [arm for arm in measured if arm[1] == SERVE]
    print()
    print_table(
        ("16 prompts of 24 tokens, T-REX", "tokens/s", "CPU s per 1k", "first token s"),
        [
            (arm[0], *columns(samples, arm), spread(samples.values(arm, lambda s: s.first_token_s), ".3f"))
            for arm in served
        ],
    )
    ratios: list[tuple[str, ...]] = []
    for suffix, bar in (("", ">= 2"), (" fp32", ">= 3")):
        ours, theirs = (f"ours{suffix}", SERVE), (f"Hugging Face{suffix}", SERVE)
        if ours in measured and theirs in measured:
            names = ("tokens_per_s", "cpu_s_per_1k", "first_token_s")
            ratios.append((suffix.strip() or "bf16", *(ratio(samples, ours, theirs, name) for name in names), bar))
    print()
    print_table(("served / Hugging Face", "speed", "CPU time", "time to first token", "bar"), ratios)


def ratio(samples: Compared, over: tuple[str, str], under: tuple[str, str], name: str) -> str:
    """Median and extremes of a quantity's ratio within rounds."""
    return spread(samples.ratios(over, under, lambda sample: float(getattr(sample, name))))


def columns(samples: Compared, arm: tuple[str, str]) -> tuple[str, str]:
    """Tokens a second and CPU seconds per thousand."""
    rates, costs = samples.values(arm, lambda s: s.tokens_per_s), samples.values(arm, lambda s: s.cpu_s_per_1k)
    return spread(rates, ".0f"), spread(costs)


if __name__ == "__main__":
    main()
