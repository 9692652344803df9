"""How the engine's threads should wait for each other: asleep, spinning, or spinning for a while and then asleep.

The same compiled base in one process per way of waiting, taking turns round by round, first alone on the machine,
then beside a neighbour that keeps one core busy. Ratios are taken within a round against "asleep"
(`OMP_WAIT_POLICY=PASSIVE`); "spin N" sets `GOMP_SPINCOUNT=N`, and "library" leaves both to GNU OpenMP (300,000).

    python benchmarks/waiting_threads.py --rounds 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from lora_decode import Sample, Worker, paired_columns

from metier.specializers.shelf.base_model import find_base

WORKLOADS = ("decode-16", "decode-1", "prefill")
WAYS: dict[str, dict[str, str]] = {
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 100000": {"GOMP_SPINCOUNT": "100000"},
    "library": {},
}
BUSY = "while True: pass"


def start(way: str, options: argparse.Namespace) -> Worker:
    """A process with the base in an engine whose threads wait in this way."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    os.environ.update(WAYS[way])
    script = str(Path(__file__).with_name("pruned_speed.py"))
    arguments = [script, "--worker", str(find_base(options.base)), "--steps", str(options.steps)]
    return Worker(arguments, threads=options.threads)


def compare(workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, list[Sample]]]:
    """Samples per way and workload; round 0 warms up."""
    samples: dict[str, dict[str, list[Sample]]] = {way: {w: [] for w in WORKLOADS} for way in workers}
    for number in range(rounds + 1):
        for workload in WORKLOADS:
            turn = number % len(workers)
            for way in [*list(workers)[turn:], *list(workers)[:turn]]:
                sample = workers[way].measure(workload)
                if number:
                    samples[way][workload].append(sample)
        print(f"round {number} of {rounds} done", file=sys.stderr)
    return samples


def report(samples: dict[str, dict[str, list[Sample]]], title: str) -> None:
    """One table per workload: median (min-max) and paired ratios to sleeping threads."""
    for workload in WORKLOADS:
        others = statistics.median(s.others for per in samples.values() for s in per[workload])
        print(f"\n{workload}, {title}, other programs' share {others:.0%} at the median")
        print("| waiting | tokens/s | CPU s per 1k | speed / asleep | asleep CPU / CPU |\n|---|---|---|---|---|")
        for way, per_workload in samples.items():
            columns = paired_columns(per_workload[workload], samples["asleep"][workload])
            print(f"| {way} | " + " | ".join(columns) + " |")


def main() -> None:
    """Parse the command line, run the rounds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="bundled base, folder or Hugging Face id")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default 5)")
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--threads", type=int, default=2, help="OMP threads per engine (default 2)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--only", choices=("alone", "busy"), help="only without, or only with the neighbour")
    options = parser.parse_args()
    workers = {way: start(way, options) for way in dict.fromkeys(["asleep", *options.ways])}
    try:
        if options.only != "busy":
            report(compare(workers, options.rounds), "alone")
        if options.only != "alone":
            with subprocess.Popen([sys.executable, "-c", BUSY]) as neighbour:
                try:
                    report(compare(workers, options.rounds), "beside a busy core")
                finally:
                    neighbour.kill()
    finally:
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()
