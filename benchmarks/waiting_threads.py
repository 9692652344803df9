"""How the engine's threads should wait for each other: asleep, spinning, or spinning for a while and then asleep.

The same compiled base in one process per way of waiting, taking turns round by round, first alone on the machine,
then beside a neighbour that keeps one core busy. Ratios are taken within a round against "asleep"
(`OMP_WAIT_POLICY=PASSIVE`); "spin N" sets `GOMP_SPINCOUNT=N`, and "library" leaves both to GNU OpenMP (300,000).

    python benchmarks/waiting_threads.py --rounds 5
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from engine_process import Compared, Worker, compare, disturbed, paired_columns
from harness import arguments, print_table

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


def report(samples: Compared, ways: list[str], title: str) -> None:
    """One table per workload: median (min-max) and paired ratios to sleeping threads."""
    for workload in WORKLOADS:
        print(f"\n{workload}, {title}, {disturbed(samples, workload)}")
        print_table(
            ("waiting", "tokens/s", "CPU s per 1k", "speed / asleep", "asleep CPU / CPU"),
            [(way, *paired_columns(samples, way, "asleep", workload)) for way in ways],
        )


def main() -> None:
    """Parse the command line, run the rounds, print the tables."""
    parser = arguments(__doc__, rounds=5, base=True, threads=2)
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed per round (default 48)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--only", choices=("alone", "busy"), help="only without, or only with the neighbour")
    options = parser.parse_args()
    ways = list(dict.fromkeys(["asleep", *options.ways]))

    def measure() -> Compared:
        return compare({w: partial(start, w, options) for w in ways}, dict.fromkeys(ways, WORKLOADS), options)

    if options.only != "busy":
        report(measure(), ways, "alone")
    if options.only != "alone":
        with subprocess.Popen([sys.executable, "-c", BUSY]) as neighbour:
            try:
                report(measure(), ways, "beside a busy core")
            finally:
                neighbour.kill()


if __name__ == "__main__":
    main()
