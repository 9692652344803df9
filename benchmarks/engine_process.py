"""Engines in processes of their own that take turns: what decode and prefill cost, and how alone each sample was.

A sample during which other programs took more than a tenth of the processors is measured again, a few times at most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

from harness import Samples, clocked, in_turns, machine, spread

__all__ = [
    "MEASURES",
    "PREFILL_TOKENS",
    "Sample",
    "Worker",
    "add",
    "answer_with",
    "compare",
    "decode",
    "disturbed",
    "least_disturbed",
    "measured",
    "paired_columns",
    "prefill",
    "prompt",
    "run_steps",
    "small_engine",
]

QUIET = 0.1
"""Share of all processors that other programs may take during a sample."""
PREFILL_TOKENS = 900
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One measurement: tokens a second of wall time, CPU seconds per 1000 tokens, other programs' share of the CPUs.

    `first_token_s` is the time to the first token where a workload begins with prompts, else 0.
    """

    tokens_per_s: float
    cpu_s_per_1k: float
    others: float = 0.0
    first_token_s: float = 0.0


Compared = Samples[tuple[str, str], Sample]
"""Samples by (engine, workload)."""


class Worker:
    """A process with one engine; it measures what its standard input says."""

    def __init__(self, arguments: Sequence[str], *, threads: int, plugin: bool = True) -> None:
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
        self._answer()
        self.ready_s = time.perf_counter() - started

    def ask(self, workload: str) -> dict[str, float]:
        """Run one workload once, and return what the process says of it."""
        assert self.process.stdin is not None
        print(workload, file=self.process.stdin, flush=True)
        return self._answer()

    def measure(self, workload: str) -> Sample:
        """Run one workload once."""
        return Sample(**self.ask(workload))

    def _answer(self) -> dict[str, float]:
        """Read the next answer line; other output of the libraries is skipped."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                answer: dict[str, float] = json.loads(line[1:])
                return answer
        raise SystemExit(f"a benchmark engine ended with code {self.process.wait()}; its error is above")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def small_engine(base: str, *, dtype: str = "bfloat16", eager: bool = False, **more: Any) -> Any:
    """vLLM's engine at the sizes of these benchmarks, without a prefix cache; `more` are further arguments of `LLM`."""
    from vllm import LLM

    sizes: dict[str, Any] = {
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 512 << 20,
        "block_size": 32,
    }
    return LLM(base, dtype=dtype, enable_prefix_caching=False, enforce_eager=eager, **(sizes | more)).llm_engine


def answer_with(measure: Callable[[str], Any]) -> None:
    """Be a worker process: answer each workload's name on standard input with what one run of it took."""
    print("@{}", flush=True)
    for line in sys.stdin:
        print("@" + json.dumps(vars(measure(line.strip()))), flush=True)


def compare(
    start: Mapping[str, Callable[[], Worker]],
    workloads: Mapping[str, Sequence[str]],
    options: Namespace,
    measure: Callable[[Worker, str], Any] = Worker.measure,
) -> Samples[tuple[str, str], Any]:
    """Start the engines, then measure every workload on each that has it, in turns, `options.rounds` times.

    `start` and `workloads` are by engine. Rounds after the warm-up repeat a disturbed sample, `options.retries` times
    at most; the engines end with the block.
    """
    workers: dict[str, Worker] = {}
    samples: Samples[tuple[str, str], Any] = Samples(
        [(name, workload) for name, own in workloads.items() for workload in own], options.journal
    )
    print(machine(), file=sys.stderr)
    try:
        for name, begin in start.items():
            workers[name] = begin()
            print(f"{name}: ready after {workers[name].ready_s:.1f} s", file=sys.stderr)
        every = list(dict.fromkeys(workload for own in workloads.values() for workload in own))
        for number in range(options.rounds + 1):
            for workload in in_turns(every, number):
                for name in in_turns([name for name in workers if workload in workloads[name]], number):
                    tries = 1 + getattr(options, "retries", 0) * bool(number)
                    sample = least_disturbed(partial(measure, workers[name], workload), tries)
                    samples.keep(number, (name, workload), sample)
            print(f"round {number} of {options.rounds} done", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    return samples


def least_disturbed(measure: Callable[[], Any], tries: int) -> Any:
    """The first sample that had the machine to itself, else the one that came closest."""
    seen = [measure()]
    while len(seen) < tries and seen[-1].others > QUIET:
        seen.append(measure())
    return min(seen, key=lambda sample: sample.others)


# ---- inside the process -----------------------------------------------------------------------------------------


def measured(tokens: int, work: Callable[[], None]) -> Sample:
    """Run `work`, which processes `tokens` tokens, and say what it cost and how alone it was."""
    with clocked() as spent:
        work()
    return Sample(tokens / spent.wall_s, spent.cpu_s * 1000 / tokens, spent.others)


def decode(
    engine: Any, requests: Sequence[Any], steps: int, extra: Sequence[dict[str, Any] | None] | None = None
) -> Sample:
    """Time `steps` decode steps of one sequence per entry of `requests`; `extra` are their extra_args."""
    for index, request in enumerate(requests):
        more = None if extra is None else extra[index]
        add(engine, f"d{index}", prompt(24 + index % 4, index), steps + 16, request, more)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        # Prefill over, every row has a token: from here each step is a pure decode step.
        if len(outputs) == len(requests):
            break
    run_steps(engine, 4)
    sample = measured(steps * len(requests), lambda: run_steps(engine, steps))
    while engine.has_unfinished_requests():
        engine.step()
    return sample


def run_steps(engine: Any, steps: int) -> None:
    """Step the engine `steps` times."""
    for _ in range(steps):
        engine.step()


def prefill(engine: Any, requests: Sequence[Any], steps: int) -> Sample:
    """Time the prefill of a long prompt, three times, one prompt at a time."""
    del steps

    def work() -> None:
        for index in range(3):
            add(engine, f"p{index}", prompt(PREFILL_TOKENS, index), 1, requests[index % len(requests)])
            while engine.has_unfinished_requests():
                engine.step()

    return measured(3 * PREFILL_TOKENS, work)


MEASURES: dict[str, Callable[[Any, Sequence[Any], int], Sample]] = {
    "decode-16": lambda engine, requests, steps: decode(
        engine, [requests[i % len(requests)] for i in range(16)], steps
    ),
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


# ---- the tables -------------------------------------------------------------------------------------------------


def paired_columns(samples: Compared, name: str, base: str, workload: str) -> tuple[str, str, str, str]:
    """Cells of a table: tokens a second, CPU seconds per 1000, speed ÷ base's, base's CPU ÷ its own, round by round."""
    own, other = (name, workload), (base, workload)
    return (
        spread(samples.values(own, lambda s: s.tokens_per_s), ".0f"),
        spread(samples.values(own, lambda s: s.cpu_s_per_1k)),
        spread(samples.ratios(own, other, lambda s: s.tokens_per_s)),
        spread(samples.ratios(other, own, lambda s: s.cpu_s_per_1k)),
    )


def disturbed(samples: Samples[tuple[str, str], Any], workload: str) -> str:
    """What share of the processors other programs took during a workload's samples."""
    others = [sample.others for arm in samples if arm[1] == workload for sample in samples[arm]]
    return f"other programs' share {median(others):.0%} at the median"
