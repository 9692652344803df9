"""What LoRA costs on the CPU engine: decode and prefill, stock vLLM and our plugin against the bare base.

Every engine lives in a process of its own and they take turns, round by round (`engine_process.py`); disturbed samples
are measured again, `--retries` times at most, and the table says how disturbed those it kept were.
"base" is an engine started WITHOUT `enable_lora`, measured both eager and with torch.compile, and every ratio is
against whichever of the two is faster for that workload.

    python benchmarks/lora_decode.py --rounds 5
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from engine_process import MEASURES, Compared, Worker, answer_with, compare, disturbed, small_engine
from harness import arguments, print_table, spread

from metier.specializers.shelf.base_model import find_base

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny_model import write_random_lora  # noqa: E402 - it lives with the tests

ADAPTERS = 4
WORKLOADS = {
    "decode-16": "decode, batch 16, 4 adapters mixed",
    "decode-1": "decode, batch 1, one adapter",
    "prefill": "prefill of 900 tokens, one adapter",
}


@dataclass(frozen=True)
class EngineKind:
    """One engine of the comparison: whether it takes adapters, runs our plugin, and may compile."""

    lora: bool
    plugin: bool
    compiled: bool


KINDS = {
    "base eager": EngineKind(lora=False, plugin=False, compiled=False),
    "base compiled": EngineKind(lora=False, plugin=False, compiled=True),
    "stock": EngineKind(lora=True, plugin=False, compiled=False),
    "ours eager": EngineKind(lora=True, plugin=True, compiled=False),
    "ours compiled": EngineKind(lora=True, plugin=True, compiled=True),
}
BASES = ("base eager", "base compiled")


def main() -> None:
    """Parse the command line, run the rounds, print the tables."""
    parser = arguments(__doc__, rounds=5, base=True, threads=2)
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default 8)")
    parser.add_argument("--max-lora-rank", type=int, default=16, help="slot rank (default 16)")
    parser.add_argument("--retries", type=int, default=4, help="repeats of a disturbed sample (default 4)")
    parser.add_argument("--engines", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--worker", choices=list(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options)
        return
    options.base = str(find_base(options.base))
    with tempfile.TemporaryDirectory(prefix="metier-lora-bench-") as scratch:
        options.adapters = Path(scratch)
        for index in range(ADAPTERS):
            write_random_lora(
                options.adapters / str(index),
                Path(options.base),
                rank=options.rank,
                seed=index,
                weight_std=0.01,
                dtype="bfloat16",
            )
        start = {kind: partial(start_worker, kind, options) for kind in options.engines}
        report(compare(start, dict.fromkeys(start, list(WORKLOADS)), options), options)


def start_worker(kind: str, options: argparse.Namespace) -> Worker:
    """A process of this program that is the engine `kind`."""
    arguments = [__file__, "--worker", kind, "--adapters", str(options.adapters)]
    for name in ("base", "steps", "max_lora_rank", "threads"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return Worker(arguments, threads=options.threads, plugin=KINDS[kind].plugin)


def serve(options: argparse.Namespace) -> None:
    """Be the engine of one worker process: answer each workload name with one sample."""
    from vllm.lora.request import LoRARequest

    kind = KINDS[options.worker]
    lora: dict[str, Any] = {}
    if kind.lora:
        lora = {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": options.max_lora_rank}
    engine = small_engine(options.base, eager=not kind.compiled, **lora)
    requests: list[Any] = [None] * ADAPTERS
    if kind.lora:
        requests = [LoRARequest(str(i), i + 1, str(options.adapters / str(i))) for i in range(ADAPTERS)]
        for request in requests:
            engine.add_lora(request)
    answer_with(lambda workload: MEASURES[workload](engine, requests, options.steps))


def report(samples: Compared, options: argparse.Namespace) -> None:
    """Print one table per workload: median (min-max) of tokens/s, CPU seconds, and the paired ratio to the base."""
    for workload, title in WORKLOADS.items():
        bases = [kind for kind in BASES if kind in options.engines]
        best = max(bases, key=lambda kind: median(samples.values((kind, workload), lambda s: s.tokens_per_s)))
        print(f"\n{title}: rank {options.rank}, slot rank {options.max_lora_rank}, {options.threads} threads,")
        print(f"{options.rounds} rounds, ratios against '{best}', {disturbed(samples, workload)}")
        rows = []
        for kind in options.engines:
            own, base = (kind, workload), (best, workload)
            rows.append(
                (
                    kind,
                    spread(samples.values(own, lambda s: s.tokens_per_s), ".0f"),
                    spread(samples.values(own, lambda s: s.cpu_s_per_1k)),
                    spread(samples.ratios(own, base, lambda s: s.tokens_per_s)),
                    spread(samples.ratios(base, own, lambda s: s.tokens_per_s)),
                    spread(samples.ratios(own, base, lambda s: s.cpu_s_per_1k)),
                )
            )
        print_table(("engine", "tokens/s", "CPU s per 1k", "speed / base", "time / base", "CPU / base"), rows)


if __name__ == "__main__":
    main()
