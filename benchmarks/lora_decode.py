"""What LoRA costs on the CPU engine: decode and prefill, stock vLLM and our plugin against the bare base.

Every engine lives in a process of its own and they take turns, round by round, so that a noisy machine hits all of
them alike; ratios are taken within a round. A sample during which other programs took more than a tenth of the
processors is measured again, `--retries` times at most; the table says how disturbed the samples it kept were.
"base" is an engine started WITHOUT `enable_lora`, measured both eager and with torch.compile, and every ratio is
against whichever of the two is faster for that workload.

    python benchmarks/lora_decode.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.specializers.shelf.base_model import find_base

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny_model import write_random_lora  # noqa: E402 - it lives with the tests

ADAPTERS = 4
QUIET = 0.1  # share of all processors that other programs may take during a sample
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


@dataclass(frozen=True)
class Sample:
    """One measurement: tokens a second of wall time, CPU seconds per 1000 tokens, other programs' share of the CPUs.

    `first_token_s` is the time to the first token where a workload begins with prompts, else 0.
    """

    tokens_per_s: float
    cpu_s_per_1k: float
    others: float = 0.0
    first_token_s: float = 0.0


def main() -> None:
    """Parse the command line, run the rounds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="bundled base, folder or Hugging Face id")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default 5)")
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default 8)")
    parser.add_argument("--max-lora-rank", type=int, default=16, help="slot rank (default 16)")
    parser.add_argument("--threads", type=int, default=2, help="OMP threads per engine (default 2)")
    parser.add_argument("--retries", type=int, default=4, help="repeats of a disturbed sample (default 4)")
    parser.add_argument("--engines", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--json", type=Path, help="also write every sample to this file")
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
        samples = compare(options)
    if options.json:
        rows = {kind: {w: [vars(s) for s in got] for w, got in per.items()} for kind, per in samples.items()}
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    report(samples, options)


def compare(options: argparse.Namespace) -> dict[str, dict[str, list[Sample]]]:
    """Start one process per engine kind, then measure every workload on each of them in turn, round by round."""
    workers = {kind: start_worker(kind, options) for kind in options.engines}
    samples: dict[str, dict[str, list[Sample]]] = {k: {w: [] for w in WORKLOADS} for k in workers}
    try:
        for kind, worker in workers.items():
            print(f"{kind}: ready after {worker.ready_s:.1f} s", file=sys.stderr)
        for round_number in range(options.rounds + 1):  # round 0 warms up and is not counted
            for workload in WORKLOADS:
                # The order turns with the round, so that no engine always runs after the same neighbour.
                order = list(workers)[round_number % len(workers) :] + list(workers)[: round_number % len(workers)]
                for kind in order:
                    tries = (workers[kind].measure(workload) for _ in range(1 + options.retries))
                    sample = least_disturbed(tries)
                    if round_number:
                        samples[kind][workload].append(sample)
            print(f"round {round_number} of {options.rounds} done", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    return samples


def start_worker(kind: str, options: argparse.Namespace) -> Worker:
    """A process of this program that is the engine `kind`."""
    arguments = [__file__, "--worker", kind, "--adapters", str(options.adapters)]
    for name in ("base", "steps", "max_lora_rank", "threads"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return Worker(arguments, threads=options.threads, plugin=KINDS[kind].plugin)


def least_disturbed(tries: Iterable[Sample]) -> Sample:
    """The first sample that had the machine to itself, else the one that came closest."""
    seen = []
    for sample in tries:
        seen.append(sample)
        if sample.others <= QUIET:
            break
    return min(seen, key=lambda sample: sample.others)


class Worker:
    """A process with one engine; it measures what it is told to on its standard input."""

    def __init__(self, arguments: list[str], *, threads: int, plugin: bool = True) -> None:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "METIER_PLUGIN": "1" if plugin else "0",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()
        self.ready_s = time.perf_counter() - started

    def answer(self) -> dict[str, float]:
        """Read the next answer line; other output of the libraries is skipped."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                answer: dict[str, float] = json.loads(line[1:])
                return answer
        raise SystemExit(f"a benchmark engine ended with code {self.process.wait()}; its error is above")

    def measure(self, workload: str) -> Sample:
        """Run one workload once."""
        assert self.process.stdin is not None
        print(workload, file=self.process.stdin, flush=True)
        return Sample(**self.answer())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(options: argparse.Namespace) -> None:
    """Be the engine of one worker process: answer each workload name with one sample."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    kind = KINDS[options.worker]
    lora: dict[str, Any] = {}
    if kind.lora:
        lora = {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": options.max_lora_rank}
    llm = LLM(
        str(options.base),
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=512 << 20,
        block_size=32,
        enable_prefix_caching=False,
        enforce_eager=not kind.compiled,
        **lora,
    )
    requests: list[Any] = [None] * ADAPTERS
    if kind.lora:
        requests = [LoRARequest(str(i), i + 1, str(options.adapters / str(i))) for i in range(ADAPTERS)]
        for request in requests:
            llm.llm_engine.add_lora(request)
    engine = llm.llm_engine
    print("@{}", flush=True)
    for line in sys.stdin:
        sample = MEASURES[line.strip()](engine, requests, options.steps)
        print("@" + json.dumps(vars(sample)), flush=True)


def measured(tokens: int, work: Callable[[], None]) -> Sample:
    """Run `work`, which processes `tokens` tokens, and say what it cost and how alone it was."""
    busy, cpu, wall = busy_s(), time.process_time(), time.perf_counter()
    work()
    wall, cpu, busy = time.perf_counter() - wall, time.process_time() - cpu, busy_s() - busy
    others = max(0.0, busy - cpu) / (wall * (os.cpu_count() or 1))
    return Sample(tokens_per_s=tokens / wall, cpu_s_per_1k=cpu * 1000 / tokens, others=round(others, 3))


def busy_s() -> float:
    """CPU seconds that all programs of this machine have used since it started (0.0 where /proc is missing)."""
    try:
        user, nice, system = Path("/proc/stat").read_text(encoding="utf-8").split()[1:4]
    except OSError:
        return 0.0
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def decode(engine: Any, requests: list[Any], steps: int, extra: list[dict[str, Any] | None] | None = None) -> Sample:
    """Time `steps` decode steps of one sequence per entry of `requests`; `extra` are their extra_args."""
    for index, request in enumerate(requests):
        more = None if extra is None else extra[index]
        add(engine, f"d{index}", prompt(24 + index % 4, index), steps + 16, request, more)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        # Prefill over, every row has a token: from here each step is a pure decode step.
        if len(outputs) == len(requests):
            break
    for _ in range(4):
        engine.step()
    sample = measured(steps * len(requests), lambda: run_steps(engine, steps))
    while engine.has_unfinished_requests():
        engine.step()
    return sample


def run_steps(engine: Any, steps: int) -> None:
    """Step the engine `steps` times."""
    for _ in range(steps):
        engine.step()


def prefill(engine: Any, requests: list[Any], steps: int) -> Sample:
    """Time the prefill of 900 tokens, three times, one prompt at a time."""
    del steps

    def work() -> None:
        for index in range(3):
            add(engine, f"p{index}", prompt(900, index), 1, requests[index % len(requests)])
            while engine.has_unfinished_requests():
                engine.step()

    return measured(2700, work)


MEASURES: dict[str, Callable[[Any, list[Any], int], Sample]] = {
    "decode-16": lambda engine, requests, steps: decode(engine, [requests[i % ADAPTERS] for i in range(16)], steps),
    "decode-1": lambda engine, requests, steps: decode(engine, requests[:1], steps),
    "prefill": prefill,
}


def prompt(length: int, seed: int) -> list[int]:
    """Token ids of a prompt of exactly `length` tokens; the text does not matter for speed."""
    return [100 + (seed * 7919 + position * 31) % 5000 for position in range(length)]


def add(
    engine: Any,
    name: str,
    tokens: list[int],
    new_tokens: int,
    request: Any,
    extra: dict[str, Any] | None = None,
) -> None:
    """Add one greedy request of exactly `new_tokens` tokens; `extra` travels to the engine's workers with it."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, extra_args=extra)
    engine.add_request(name, {"prompt_token_ids": tokens}, params, lora_request=request)


def report(samples: dict[str, dict[str, list[Sample]]], options: argparse.Namespace) -> None:
    """Print one table per workload: median (min-max) of tokens/s, CPU seconds, and the paired ratio to the base."""
    for workload, title in WORKLOADS.items():
        bases = [kind for kind in BASES if kind in samples]
        best = max(bases, key=lambda kind: statistics.median(s.tokens_per_s for s in samples[kind][workload]))
        disturbed = max(s.others for per_workload in samples.values() for s in per_workload[workload])
        print(f"\n{title}: rank {options.rank}, slot rank {options.max_lora_rank}, {options.threads} threads,")
        print(f"{options.rounds} rounds, ratios against '{best}', other programs' share at most {disturbed:.0%}")
        heads = ("engine", "tokens/s", "CPU s per 1k", "speed / base", "time / base", "CPU / base")
        print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for kind, per_workload in samples.items():
            pairs = list(zip(per_workload[workload], samples[best][workload], strict=True))
            columns = (
                spread([s.tokens_per_s for s, _ in pairs], 0),
                spread([s.cpu_s_per_1k for s, _ in pairs], 2),
                spread([s.tokens_per_s / b.tokens_per_s for s, b in pairs], 2),
                spread([b.tokens_per_s / s.tokens_per_s for s, b in pairs], 2),
                spread([s.cpu_s_per_1k / b.cpu_s_per_1k for s, b in pairs], 2),
            )
            print(f"| {kind} | " + " | ".join(columns) + " |")


def paired_columns(samples: list[Sample], base: list[Sample]) -> tuple[str, str, str, str]:
    """Cells of a table: tokens a second, CPU seconds per 1000, speed ÷ base's, base's CPU ÷ its own, round by round."""
    pairs = list(zip(samples, base, strict=True))
    return (
        spread([s.tokens_per_s for s in samples], 0),
        spread([s.cpu_s_per_1k for s in samples], 2),
        spread([s.tokens_per_s / b.tokens_per_s for s, b in pairs], 2),
        spread([b.cpu_s_per_1k / s.cpu_s_per_1k for s, b in pairs], 2),
    )


def spread(values: list[float], digits: int) -> str:
    """Median with the smallest and the largest value."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
