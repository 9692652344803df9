"""The demo's team in each number type and in the one that `auto` chooses, in turns: CPU-seconds of its asks.

    python benchmarks/number_types.py
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/number_types.py

Each sample is `metier demo --skip-base` in a process of its own, on all threads that the settings give it; starting the
engine is not counted. The second command rules out the instructions of newer processors, which is most of the way to
such a machine. The bar: `auto` costs at most 1.2 of the best.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness import Samples, arguments, machine, paired_rounds, print_table, spread

from metier.runtime.store.store import RunStore

ARMS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Sample:
    """One run of the demo."""

    cpu_s: float
    """CPU-seconds of all asks."""
    tokens: int
    solved: int


def demo(dtype: str, tasks: int, seconds: float) -> Sample:
    """Run the demo in a number type. Raises: what subprocess raises when it fails or takes longer than `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "demo.db"
        command = [
            sys.executable, "-c", "from metier.runtime.cli.main import main; main()", "demo", "--skip-base",
            "--tasks", str(tasks), "--store", str(store), "--report", f"{folder}/report.md",
            "--set", f"engine.dtype={dtype}",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=seconds)
        with RunStore(store) as kept:
            asks = kept.query("SELECT sum(cpu_s) AS cpu_s, sum(prompt_tokens + answer_tokens) AS tokens FROM asks")[0]
            solved = kept.query("SELECT count(*) AS n FROM runs WHERE score >= 1")[0]["n"]
    return Sample(asks["cpu_s"], asks["tokens"], solved)


def main() -> None:
    """Parse options, run the rounds, print the table."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--tasks", type=int, default=24, help="puzzles a sample (default 24)")
    parser.add_argument("--seconds", type=float, default=900.0, help="most seconds a sample may take (default 900)")
    options = parser.parse_args()
    ruled_out = {name: os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY") if name in os.environ}
    print(machine(), ruled_out or "")
    samples: Samples[str, Sample] = Samples(ARMS, options.journal)
    for number, arm in paired_rounds(ARMS, options.rounds):
        sample = samples.keep(number, arm, demo(arm, options.tasks, options.seconds))
        print(f"round {number} {arm}: {sample.cpu_s:.1f} CPU-s, {sample.solved} solved", file=sys.stderr, flush=True)
    rows = [
        (
            arm,
            spread(samples.values(arm, lambda sample: sample.cpu_s)),
            spread(samples.ratios("auto", arm, lambda sample: sample.cpu_s)),
            ", ".join(str(sample.solved) for sample in samples[arm]),
            ", ".join(str(sample.tokens) for sample in samples[arm]),
        )
        for arm in ARMS
    ]
    print_table(("number type", "CPU-s", "auto ÷ it", "solved", "tokens"), rows)


if __name__ == "__main__":
    main()
