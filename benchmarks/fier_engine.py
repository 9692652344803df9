"""Decode in the whole engine with retrieval and without, on real text: time a step, attention's share, the ceiling.

Every engine lives in a process of its own, and they take turns round by round; ratios are taken within a round, and
disturbed samples are measured again (see `engine_process.py`). A round asks the same prompts as the one before, so only
the first has to read them. The time inside attention, and inside the update of its cache, is taken by a clock around
each layer's call. The ceiling is what stock attention in no time at all would give. `--overhead` measures what
contexts below the minimum pay, in one process.

    python benchmarks/fier_engine.py --rounds 5
    python benchmarks/fier_engine.py --rounds 20 --overhead
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from engine_process import Worker, add, answer_with, compare, disturbed, measured, run_steps
from harness import Samples, arguments, paired_rounds, print_table, spread

from metier.specializers.checkpoints.perplexity import offline_text, text_windows
from metier.specializers.shelf.base_model import find_base
from metier.specializers.shelf.fier_settings import FierSettings

# Context tokens and batch of each workload.
WORKLOADS = {"long-1": (7500, 1), "long-4": (7500, 4), "short-1": (1000, 1), "short-4": (1000, 4)}


@dataclass(frozen=True)
class Step:
    """One decode step: wall and CPU ms, wall ms inside attention and its cache's update, other programs' share."""

    ms: float
    cpu_ms: float
    attention_ms: float
    update_ms: float
    others: float


class Clock:
    """Wall seconds spent in the calls it is put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


class Decoder:
    """An engine with a budget, 0 for stock attention, that decodes real text; clocks stand around every layer."""

    def __init__(self, options: argparse.Namespace, budget: int) -> None:
        from metier.runtime.engines.vllm_environment import import_vllm

        import_vllm(threads=options.threads, in_process=True)
        from vllm.v1.engine.llm_engine import LLMEngine

        from metier.runtime.engines.engine_arguments import engine_arguments
        from metier.runtime.settings.engine import EngineSettings

        settings = EngineSettings(
            kv_cache_mib=1536,
            max_model_tokens=8192,
            max_running=4,
            block_tokens=128,
            threads=options.threads,
            eager=options.eager,
            fier=FierSettings(budget_tokens=budget) if budget else None,
        )
        args = engine_arguments(Path(options.base), dtype="bfloat16", settings=settings, adapters=False)
        self._engine: Any = LLMEngine.from_engine_args(args)
        longest = max(tokens for tokens, _ in WORKLOADS.values())
        self._windows = text_windows(self._engine.get_tokenizer(), offline_text()[1], count=4, tokens=longest)
        self._attention, self._update = Clock(), Clock()
        model = self._engine.model_executor.driver_worker.worker.model_runner
        self.layers = [layer.impl for layer in model.compilation_config.static_forward_context.values()]

    def put_clocks(self) -> None:
        """Time every layer's attention and the update of its cache from now on."""
        for impl in self.layers:
            impl.forward = self._attention.around(impl.forward)
            impl.do_kv_cache_update = self._update.around(impl.do_kv_cache_update)

    def decode(self, workload: str, steps: int) -> Step:
        """The mean of so many steps, each of which decodes one token of every sequence."""
        engine = self._engine
        tokens, batch = WORKLOADS[workload]
        for number in range(batch):
            add(engine, f"d{number}", self._windows[number][:tokens], steps + 16, None)
        while len(engine.step()) < batch:  # prompts are read, or found in the prefix cache
            pass
        run_steps(engine, 4)
        self._attention.seconds = self._update.seconds = 0.0
        sample = measured(steps, lambda: run_steps(engine, steps))
        inside = (self._attention.seconds * 1000 / steps, self._update.seconds * 1000 / steps)
        while engine.has_unfinished_requests():
            engine.step()
        return Step(1000 / sample.tokens_per_s, sample.cpu_s_per_1k, *inside, sample.others)


def serve(options: argparse.Namespace) -> None:
    """Be the engine of one worker process: answer each workload name with one step's cost."""
    decoder = Decoder(options, options.worker)
    decoder.put_clocks()
    answer_with(lambda workload: decoder.decode(workload, options.steps))


def overhead(options: argparse.Namespace) -> None:
    """What retrieval costs contexts that are too short for it: one engine whose layers are made stock and back.

    Two processes differ by more than the few microseconds a layer that this is about.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    decoder = Decoder(options, options.budgets[0])
    ours = type(decoder.layers[0])
    for workload in ("short-1", "short-4"):
        kinds = {"ours": ours, "stock": CPUAttentionBackendImpl}
        steps: Samples[str, Step] = Samples(list(kinds), options.journal)
        for number, kind in paired_rounds(list(kinds), options.rounds):
            for impl in decoder.layers:
                impl.__class__ = kinds[kind]
            steps.keep(number, kind, decoder.decode(workload, options.steps))
        tokens, batch = WORKLOADS[workload]
        stock = spread(steps.values("stock", lambda s: s.ms))
        ratios = [spread(steps.ratios("ours", "stock", of), ".4f") for of in (lambda s: s.ms, lambda s: s.cpu_ms)]
        print(
            f"{tokens} tokens x {batch}: stock {stock} ms a step, ours ÷ stock {ratios[0]}, CPU {ratios[1]}", flush=True
        )


def report(steps: Samples[tuple[str, str], Step], names: list[str], options: argparse.Namespace) -> None:
    """One table per workload: medians (least-greatest), and ratios taken round by round."""
    for workload in options.workloads:
        tokens, batch = WORKLOADS[workload]
        stock = ("stock", workload)
        share = median(steps.values(stock, lambda s: s.attention_ms / s.ms))
        how = "eager" if options.eager else "compiled"
        print(f"\n{tokens} tokens x {batch}, {options.threads} threads, {how}, {options.rounds} rounds of ", end="")
        print(f"{options.steps} steps, {disturbed(steps, workload)}.")
        print(f"Attention is {share:.0%} of a stock step, so at most {1 / (1 - share):.2f}x can come of it.")
        rows = []
        for name in names:
            own = (name, workload)
            rows.append(
                (
                    name,
                    spread(steps.values(own, lambda s: s.ms)),
                    spread(steps.values(own, lambda s: s.cpu_ms)),
                    spread(steps.values(own, lambda s: s.attention_ms)),
                    spread(steps.values(own, lambda s: s.update_ms)),
                    spread(steps.ratios(stock, own, lambda s: s.ms), ".3f"),
                    spread(steps.ratios(stock, own, lambda s: s.cpu_ms), ".3f"),
                )
            )
        heads = ("attention", "ms a step", "CPU-ms", "attention, ms", "update, ms", "stock ÷ this", "CPU: stock ÷ this")
        print_table(heads, rows)


def start_worker(budget: int, options: argparse.Namespace) -> Worker:
    """A process of this program that is the engine with a budget."""
    arguments = [__file__, "--worker", str(budget), "--base", options.base, "--steps", str(options.steps)]
    arguments += ["--threads", str(options.threads), *(["--eager"] if options.eager else [])]
    return Worker(arguments, threads=options.threads)


def main() -> None:
    """Parse the command line, start the engines, run the rounds, print the tables."""
    parser = arguments(__doc__, rounds=5, base=True, threads=2)
    parser.add_argument("--budgets", type=int, nargs="+", default=[512], help="tokens that are retrieved (default 512)")
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--retries", type=int, default=2, help="repeats of a disturbed sample (default 2)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--overhead", action="store_true", help="instead: what contexts below the minimum pay")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        serve(options)
        return
    options.base = str(find_base(options.base))
    if options.overhead:
        overhead(options)
        return
    budgets = {"stock": 0} | {f"top {budget}": budget for budget in options.budgets}
    start = {name: partial(start_worker, budget, options) for name, budget in budgets.items()}
    # The first round reads the prompts.
    steps = compare(start, dict.fromkeys(start, options.workloads), options, lambda at, w: Step(**at.ask(w)))
    report(steps, list(start), options)


if __name__ == "__main__":
    main()
