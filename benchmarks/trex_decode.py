"""What the T-REX gate costs when served, and what serving gains over Hugging Face generate on the same adapter.

One engine holds four random adapters each of T-REX (r1 = 4, r2 = 8: 36 rows of a slot), LoRA of rank 36 and LoRA of
rank 8, so a round compares them in one process; "base" is an engine started without `enable_lora`. All engines are
compiled. A further one runs in fp32. "Hugging Face" is peft's `generate` through the tuner that trains T-REX. Every
engine lives in a process of its own and they take turns, round by round; ratios are taken within a round. A sample
during which other programs took more than a tenth of the processors is measured again, `--retries` times at most.

    python benchmarks/trex_decode.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from lora_decode import Sample, Worker, add, decode, least_disturbed, measured, prompt, spread

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

Samples = dict[tuple[str, str], list[Sample]]


def main() -> None:
    """Parse the command line, run the rounds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="bundled base, folder or Hugging Face id")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default 5)")
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--answer-tokens", type=int, default=32, help="tokens of a served answer (default 32)")
    parser.add_argument("--threads", type=int, default=2, help="threads per engine (default 2)")
    parser.add_argument("--retries", type=int, default=3, help="repeats of a disturbed sample (default 3)")
    parser.add_argument("--workers", nargs="+", default=list(WORKERS), choices=list(WORKERS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write every sample to this file")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work = hugging_face if options.worker.startswith("Hugging") else engine
        serve(work(options), options.worker)
        return
    options.base = str(find_base(options.base))
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as our engines set it; for all processes alike
    with tempfile.TemporaryDirectory(prefix="metier-trex-bench-") as scratch:
        options.adapters = Path(scratch)
        write_adapters(options.adapters, Path(options.base))
        samples = compare(options)
    if options.json:
        rows = [{"worker": w, "workload": name, **vars(s)} for (w, name), got in samples.items() for s in got]
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    report(samples, options)


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


def compare(options: argparse.Namespace) -> Samples:
    """Start the processes, then measure every workload on each of them in turn, round by round."""
    workers: dict[str, Worker] = {}
    samples: Samples = {(name, workload): [] for name in options.workers for workload in WORKERS[name]}
    try:
        for name in options.workers:
            workers[name] = start_worker(name, options)
            print(f"{name}: ready after {workers[name].ready_s:.1f} s", file=sys.stderr)
        for round_number in range(options.rounds + 1):  # round 0 warms up and is not counted
            # The order turns with the round, so that nothing always runs after the same neighbour.
            turn = round_number % len(samples)
            for name, workload in [*samples][turn:] + [*samples][:turn]:
                tries = (workers[name].measure(workload) for _ in range(1 + options.retries * bool(round_number)))
                sample = least_disturbed(tries)
                if round_number:
                    samples[name, workload].append(sample)
            print(f"round {round_number} of {options.rounds} done", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    return samples


def start_worker(name: str, options: argparse.Namespace) -> Worker:
    """A process of this program that is the engine `name`."""
    arguments = [__file__, "--worker", name, "--adapters", str(options.adapters)]
    for setting in ("base", "steps", "answer_tokens", "threads"):
        arguments += [f"--{setting.replace('_', '-')}", str(getattr(options, setting))]
    return Worker(arguments, threads=options.threads)


def serve(measure: Callable[[str], Sample], name: str) -> None:
    """Be a worker process: answer each workload's name with one sample."""
    print("@{}", flush=True)
    for line in sys.stdin:
        assert line.strip() in WORKERS[name]
        print("@" + json.dumps(vars(measure(line.strip()))), flush=True)


# ---- the processes ----------------------------------------------------------------------------------------------


def engine(options: argparse.Namespace) -> Callable[[str], Sample]:
    """A vLLM engine with the plugin, and how it measures a workload."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    folders = {f"{kind}/{index}": options.adapters / kind / str(index) for kind in KINDS for index in range(EACH)}
    lora: dict[str, Any] = {}
    if options.worker != "base":
        lora = {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": SLOT_RANK}
    llm = LLM(
        str(options.base),
        dtype="float32" if options.worker.endswith("fp32") else "bfloat16",
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=256 << 20,
        block_size=32,
        enable_prefix_caching=False,
        **lora,
    )
    requests: dict[str | None, Any] = {None: None}
    if lora:
        for number, (name, folder) in enumerate(folders.items(), start=1):
            requests[name] = LoRARequest(name, number, str(folder))
            llm.llm_engine.add_lora(requests[name])

    def measure(workload: str) -> Sample:
        names: list[str | None] = ["T-REX/0"] * 16 if workload == SERVE else DECODES[workload]
        asked = [requests[name] for name in names]
        extra = [
            intuition_of(folders[name], row) if name and "T-REX" in name else None for row, name in enumerate(names)
        ]
        if workload == SERVE:
            return answer(llm.llm_engine, asked, extra, options.answer_tokens)
        return decode(llm.llm_engine, asked, options.steps, extra)

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


def report(samples: Samples, options: argparse.Namespace) -> None:
    """Print the decode table, the ratios with their bars, and the comparison with Hugging Face."""
    disturbed = max(sample.others for got in samples.values() for sample in got)
    print(f"\nT-REX r1={R1}, r2={R2}, slot rank {SLOT_RANK}, {options.threads} threads, {options.rounds} rounds,")
    print(f"compiled engines, bf16 unless said, other programs' share at most {disturbed:.0%}\n")
    print("| decode | tokens/s | CPU s per 1k |\n|---|---|---|")
    for (_, workload), got in samples.items():
        if workload != SERVE:
            print(f"| {workload} | {column(got, 'tokens_per_s', 0)} | {column(got, 'cpu_s_per_1k', 2)} |")
    print("\n| ratio within rounds | wall time | CPU time | bar |\n|---|---|---|---|")
    for batch in (16, 1):
        for other in ("LoRA 36", "LoRA 8"):
            bar = "<= 1.15" if (batch, other) == (16, "LoRA 36") else ""
            trex, lora = (samples.get(("ours", f"{kind}, batch {batch}")) for kind in ("T-REX", other))
            if trex and lora:
                columns = ratio(lora, trex, "tokens_per_s"), ratio(trex, lora, "cpu_s_per_1k")
                print(f"| T-REX step / {other} step, batch {batch} | {columns[0]} | {columns[1]} | {bar} |")
    mixed, alone = samples.get(("ours", "mixed, batch 16")), samples.get(("base", "base, batch 16"))
    if mixed and alone:
        print("\n| mixed batch of base, 3 LoRA 8, 2 T-REX | speed | CPU time | bar |\n|---|---|---|---|")
        columns = ratio(mixed, alone, "tokens_per_s"), ratio(mixed, alone, "cpu_s_per_1k")
        print(f"| / engine without adapters, batch 16 | {columns[0]} | {columns[1]} | >= 0.75 |")
    print("\n| 16 prompts of 24 tokens, T-REX | tokens/s | CPU s per 1k | first token s |\n|---|---|---|---|")
    for (name, workload), got in samples.items():
        if workload == SERVE:
            print(f"| {name} | {column(got, 'tokens_per_s', 0)} | {column(got, 'cpu_s_per_1k', 2)} |", end="")
            print(f" {column(got, 'first_token_s', 3)} |")
    print("\n| served / Hugging Face | speed | CPU time | time to first token | bar |\n|---|---|---|---|---|")
    for suffix, bar in (("", ">= 2"), (" fp32", ">= 3")):
        ours, theirs = samples.get((f"ours{suffix}", SERVE)), samples.get((f"Hugging Face{suffix}", SERVE))
        if ours and theirs:
            names = ("tokens_per_s", "cpu_s_per_1k", "first_token_s")
            ratios = " | ".join(ratio(ours, theirs, name) for name in names)
            print(f"| {suffix.strip() or 'bf16'} | {ratios} | {bar} |")


def ratio(over: list[Sample], under: list[Sample], name: str) -> str:
    """Median and extremes of a quantity's ratio within rounds."""
    return spread([getattr(a, name) / getattr(b, name) for a, b in zip(over, under, strict=True)], 2)


def column(samples: list[Sample], name: str, digits: int) -> str:
    """Median and extremes of a quantity."""
    return spread([getattr(sample, name) for sample in samples], digits)


if __name__ == "__main__":
    main()
